"""Texts into Chinese by a table, by mBART-50 or by an endpoint; what was made is kept.

OUTPUT/translator.json          which translator made what lies beside it
OUTPUT/translations/….json      {text: output} of some texts, whole or not at all
OUTPUT/answers/                 of an endpoint: see endpoint.py
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xllm_jax.core import atomic, bounded, disk, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Rows
from xllm_jax.data.rows.translated import same
from xllm_jax.prepare import endpoint as endpoints
from xllm_jax.prepare import engine, runner, translate
from xllm_jax.prepare.endpoint import Endpoint, EndpointTranslator

BATCH = 32  # texts


class Translator(Protocol):
    """What makes Chinese of English; it can go to other processes.

    Attributes:
      identity: hash of what its outputs depend on besides the texts.
    """

    @property
    def identity(self) -> str: ...

    def __call__(self, texts: Sequence[str]) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Way:
    """How texts are translated: exactly one of the three.

    Attributes:
      translations: JSON file, {text: translation}.
      translator: folder of an mBART-50 model.
      endpoint: an OpenAI-compatible API.

    Raises:
      UserError: none or several are given, or what one of them needs is not there.
    """

    translations: str = ""
    translator: str = ""
    endpoint: Endpoint | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.translations, self.translator, self.endpoint))) != 1:
            hint = (
                "Give --translations=FILE, --translator=FOLDER of an mBART-50 model, or "
                "--endpoint=URL"
            )
            raise UserError(
                "exactly one way to translate is needed", field="--translations", hint=hint
            )
        if self.translator:
            translate.check(self.translator)

    @property
    def name(self) -> str:
        """What was given, for messages."""
        return self.translations or self.translator or (self.endpoint.url if self.endpoint else "")


def outputs(
    texts: Sequence[str],
    way: Way,
    output: str,
    split: str,
    beam: Sequence[str] = (),
    workers: int = 0,
) -> tuple[dict[str, str], dict[str, Any]]:
    """What a way makes of texts; what was made before is not made again.

    Args:
      texts: of which no two say the same.
      way: how.
      output: folder of what is kept.
      split: whose texts they are; two splits of one folder may be translated at the same time.
      beam, workers: as of `runner.mapped`.

    Returns:
      ({text: output}, '' where there is none; what an endpoint cost, `endpoint.spent`).

    Raises:
      UserError: the folder holds outputs of another translator, or what a translator raises.
    """
    if way.translations:
        return looked_up(texts, read_table(way.translations)), {}
    folder = Path(output)
    answers, kept = folder / "answers", folder / "translations"
    if way.endpoint:
        made: Any = EndpointTranslator(way.endpoint, answers)
    else:
        made = translate.Translator(way.translator)
    hint = "Choose another --output, or remove translator.json, translations and answers"
    file, about = folder / "translator.json", {"translator": way.name}
    another = "translations of another translator or model"
    sharded_job.begin(file, made.identity, about, lambda found: another, hint)
    disk.make_folder(kept)
    todo = pending(texts, known(kept))
    files = {batch_file(str(kept), batch): len(batch) for batch in todo}
    step, results = TranslateBatch(str(kept), made), folder / f"{split}_done.json"
    threads, stop = (way.endpoint.parallel, made.stop) if way.endpoint else (1, lambda: None)
    with engine.Progress("translate", sum(files.values()), engine.Finished(files), "texts"):
        runner.mapped(step, todo, results, beam, workers, threads, stop)
    atomic.remove_partial(folder)
    found = known(kept)
    counts = endpoints.spent(way.endpoint, answers) if way.endpoint else {}
    return {text: found[text] for text in texts}, counts


def read_table(file: str) -> dict[str, str]:
    """{text: translation} of a JSON file.

    Raises:
      UserError: it is something else.
    """
    rows = Rows(Path(file), objects=True)  # of millions of captions, not within the bound of a file
    with files.opened(rows.path) as opened:
        said = [rows.read(opened, index) for index in range(len(rows))]
    if rows.names is None or not all(isinstance(one, str) for one in said):
        raise UserError("is no table of texts", field=file, hint='{"text": "translation"}')
    return dict(zip(rows.names, said))


def looked_up(texts: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    """The table for all texts: where it lacks one, it may have another that says the same."""
    alike = {same(text): said for text, said in table.items() if said.strip()}
    return {text: table.get(text, "").strip() or alike.get(same(text), "") for text in texts}


def known(folder: Path) -> dict[str, str]:
    """{text: output} of all that a folder keeps."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")):
        found |= bounded.read_json(file)
    return found


def pending(texts: Sequence[str], done: Mapping[str, str]) -> list[list[str]]:
    """Batches of what is not translated: those of all texts where they are whole, so that an
    interruption changes nothing, and new ones of the rest."""
    whole, rest = [], []
    for batch in batches(texts):
        left = [text for text in batch if text not in done]
        if len(left) == len(batch):
            whole.append(batch)
        else:
            rest += left
    return whole + batches(rest)


class TranslateBatch:
    """Translates a batch into a file named after its texts; a file that is there is left alone."""

    def __init__(self, folder: str, translator: Translator):
        self._folder, self._translator = folder, translator

    def __call__(self, texts: Sequence[str]) -> None:
        """Writes the file of some texts."""
        file = batch_file(self._folder, texts)
        if not file.is_file():
            atomic.write_json(file, dict(zip(texts, self._translator(texts))))


def batch_file(folder: str, texts: Sequence[str]) -> Path:
    """Where the translations of a batch are kept: JSON, {text: translation}."""
    name = hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()
    return Path(folder) / f"{name[:32]}.json"


def batches(texts: Sequence[str], size: int = BATCH) -> list[list[str]]:
    """Texts in batches of about one length, always the same for the same texts."""
    ordered = sorted(texts, key=lambda text: (len(text), text))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
