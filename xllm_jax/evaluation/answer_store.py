"""Answers to test sets, each sample once, whatever is killed and however many hosts share the work.

    FOLDER/answers/SET.plan.json          what the answers depend on, by identity
    FOLDER/answers/shards/SET-00000.json  the answers to some samples, whole or not at all
    FOLDER/answers/SET.jsonl              all of them, a line each: {"key", "answer", "failed"}

A shard's samples are answered together and by one host, so that answers do not depend on how many
hosts there are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from xllm_jax.core import atomic, bounded, checksum, sharded_job
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.progress import Bar
from xllm_jax.core.sharded_job import Shards
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.example import Example
from xllm_jax.evaluation.measure import Answer

FOLDER = "answers"
HINT = "Choose another --output, or remove its folder 'answers'"


@dataclasses.dataclass(frozen=True)
class Answered:
    """A test set with its answers.

    Attributes:
      examples: the samples.
      answers: theirs, '' where there is none.
      failed: why there is none, '' where there is one.
    """

    examples: tuple[Example, ...]
    answers: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def failures(self) -> int:
        """Number of samples without an answer."""
        return sum(map(bool, self.failed))


def job(folder: Path, name: str, examples: Sequence[Example], about: object, size: int) -> Shards:
    """The job of answering a set, begun or taken up.

    Args:
      folder: of the evaluation.
      name: of the set.
      examples: its samples.
      about: what the answers depend on besides the samples, JSON.
      size: samples of a shard.

    Raises:
      UserError: the folder holds answers of another model or to other questions.
    """
    asked = [[one.key, one.media, one.instruction, one.history] for one in examples]
    plan = checksum.of_json([about, asked, size])
    place = folder / FOLDER
    file = place / f"{name}.plan.json"
    other = lambda found: f"answers to {name} of another model or other questions"  # noqa: E731
    sharded_job.begin(file, plan, {"about": about}, other, HINT)
    return Shards(place, name, len(examples), size, plan=plan)


def write(shards: Shards, todo: Sequence[int], examples: Sequence[Example], answer: Answer) -> None:
    """Answers the samples of some shards.

    Args:
      shards: the job.
      todo: which shards.
      examples: all samples of the set.
      answer: see `measure.Answer`.

    Raises:
      UserError: every sample of a shard fails; the first one's reason.
    """
    with Bar(total=shards.rows_in(todo), desc=shards.name, unit="samples") as bar:
        for shard in todo:
            rows = [examples[row] for row in shards.rows(shard)]
            answers, failed = tried(answer, rows)
            note = {"plan": shards.plan, "answers": answers, "failed": failed}
            atomic.write_json(shards.note(shard), note)
            bar.update(len(rows))


def tried(answer: Answer, examples: Sequence[Example]) -> tuple[list[str], list[str]]:
    """(answers, why there is none) of some samples; one that cannot be read costs itself alone.

    Raises:
      UserError: more than one sample, and every one fails: then it is not the samples.
    """
    try:
        return list(answer(examples)), [""] * len(examples)
    except CannotWrite:
        raise
    except UserError as error:
        if len(examples) == 1:
            return [""], [str(error)]
        first = error
    middle = len(examples) // 2  # halves, so that one bad file costs few batches more
    answers, failed = tried(answer, examples[:middle])
    others = tried(answer, examples[middle:])
    if all(failed) and all(others[1]):
        raise first
    return answers + others[0], failed + others[1]


def read(shards: Shards, examples: Sequence[Example]) -> Answered | None:
    """The answers to a set, also written as lines; None while shards are missing."""
    if shards.todo():
        return None
    notes = shards.notes()
    answers = [text for note in notes for text in note["answers"]]
    failed = [why for note in notes for why in note["failed"]]
    rows = zip(examples, answers, failed, strict=True)
    lines = [{"key": e.key, "answer": answer, "failed": why} for e, answer, why in rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic.write_text(shards.folder / f"{shards.name}.jsonl", text)
    return Answered(tuple(examples), tuple(answers), tuple(failed))


def stored(folder: Path, name: str, examples: Sequence[Example]) -> Answered | None:
    """Another run's answers to the same set; None where it has none to it.

    Args:
      folder: of that evaluation.
      name: of the set.
      examples: the samples.

    Raises:
      UserError: a broken file, or answers to other samples.
    """
    file = folder / FOLDER / f"{name}.jsonl"
    if not file.is_file():
        return None
    rows = [_row(line, file) for line in split_lines(bounded.read_text(file)) if line]
    if [row["key"] for row in rows] != [example.key for example in examples]:
        hint = "Compare runs of the same sets, with the same limit"
        raise UserError("has answers to other samples", field=str(file), hint=hint)
    answers = tuple(row["answer"] for row in rows)
    return Answered(tuple(examples), answers, tuple(row["failed"] for row in rows))


def _row(line: str, file: Path) -> dict[str, str]:
    wanted = {"key", "answer", "failed"}
    try:
        row = json.loads(line)
        if wanted <= row.keys() and all(isinstance(row[name], str) for name in wanted):
            return row
    except (ValueError, AttributeError):
        pass
    raise UserError("has a line that is no answer", field=str(file), hint=f"Keys: {sorted(wanted)}")


def identity(folder: Path) -> str:
    """Hash of the files of a run's result, so that answers of another training are not taken."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return checksum.of_json([[str(f.relative_to(folder)), atomic.sha256(f)] for f in files])


Load = Callable[[], Answer]
