"""LLaVA-test, the paper's Table 1: 30 images, three kinds of questions, a judge that reads answers.

Two numbers of every kind: LLaVA's own formula, and ours from both orders (`evaluation/judge.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import bounded, checksum
from xllm_jax.core.chat_endpoint import Endpoint
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.suite import JudgedSuite
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Rows
from xllm_jax.evaluation import back_translation, judge, measure
from xllm_jax.evaluation.judge import Case, Judged
from xllm_jax.evaluation.kept_replies import Question, Replies
from xllm_jax.evaluation.suites.run import Found, Model, samples
from xllm_jax.report.suite_page import interval
from xllm_jax.report.tables import NONE, Cell, Table

TITLE = "LLaVA-test (Table 1)"
ASKS = True  # a model
CONTEXTS = "caps_boxes_coco2014_val_80.jsonl"  # as LLaVA has it, beside the questions
ASKED_OTHERWISE = ("questions", "captions")  # the reader's options that change the language
ALL = "all"


def tasks(config: JudgedSuite, model: Model | None = None) -> dict[str, tuple[Example, ...]]:
    """The questions, as they are asked.

    Raises:
      UserError: no set is there.
    """
    return samples(config)


def cases(config: JudgedSuite, found: Found) -> list[Case]:
    """The questions as the judge reads them, answers translated back.

    Raises:
      UserError: a question without reference, answer to translate or context.
    """
    made = []
    for name, one in found.sets.items():
        source = config.sets[name]
        texts = _judged(config, name)
        known = contexts(config, source)
        folder = found.folder / "translations"
        answers = back_translation.translated(one.answers, config.translation, folder)
        for example, answer in zip(one.examples, answers):
            made.append(_case(example, answer, texts, known))
    return made


def _judged(config: JudgedSuite, name: str) -> dict[str, Example]:
    """{key: question and reference answer in the judge's language}."""
    source = config.sets[name]
    options = {n: v for n, v in source.options.items() if n not in ASKED_OTHERWISE}
    given = {"questions": config.questions, "answers": config.references}
    options |= {name: value for name, value in given.items() if value}
    other = dataclasses.replace(source, options=options)
    plain = dataclasses.replace(config, sets={name: other}, only=(name,), limit=0)
    return {example.key: example for example in samples(plain)[name]}


def _case(
    example: Example, answer: str, texts: Mapping[str, Example], known: Mapping[str, str]
) -> Case:
    asked = texts.get(example.key)
    if asked is None or not asked.answer:
        hint = "Give --config.references=FILE with a line {question_id, text} for every question"
        raise UserError(f"question {example.key} has no reference answer", hint=hint)
    name = os.path.basename(str(example.media[0][1])).removeprefix("COCO_val2014_")
    if name not in known:
        hint = "Give --config.contexts=FILE with a line for every image"
        raise UserError(f"nothing is known of the image {name}", field="contexts", hint=hint)
    kind = example.tags[0] if example.tags else "conv"
    return Case(example.key, kind, known[name], asked.instruction, asked.answer, answer)


def contexts(config: JudgedSuite, source: Source) -> dict[str, str]:
    """{name of an image: what the judge is told of it}.

    Raises:
      UserError: no such file, or a line of another form.
    """
    file = Path(config.contexts or os.path.join(config.root, source.path, CONTEXTS))
    rows, found = Rows(file), {}
    for place, row in enumerate(rows.tried()):
        if isinstance(row, UserError):
            raise row
        try:
            found[str(row["image"])] = judge.described(row)
        except (KeyError, TypeError):
            hint = '{"image", "captions": [text, …], "instances": [{"category", "bbox"}, …]}'
            raise UserError("is no context", field=rows.place(place), hint=hint) from None
    return found


def rules(config: JudgedSuite) -> dict[str, dict[str, str]]:
    """{kind: its role and prompt}: the user's, in LLaVA's form, or ours.

    Raises:
      UserError: the file cannot be read, or is of another form.
    """
    if not config.judge.rules:
        return judge.RULES
    file = Path(config.judge.rules)
    try:
        found = bounded.read_json(file)
        return {kind: {n: str(rule[n]) for n in ("role", "prompt")} for kind, rule in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        hint = '{"conv": {"role": "Assistant", "prompt": "…"}, …}'
        raise UserError("is no file of rules", field=str(file), hint=hint) from None


def replies(config: JudgedSuite, folder: Path) -> Replies:
    """The judge's replies, with the judge behind them where one is set.

    Raises:
      UserError: the judge's settings are incomplete.
    """
    how = config.judge
    request = {"temperature": how.temperature, "max_tokens": how.max_tokens}
    endpoint = None
    if how.url:
        try:
            endpoint = Endpoint(
                how.url,
                how.model,
                how.key_file,
                request=request,
                parallel=how.parallel,
                timeout=how.timeout,
                wait=how.wait,
                attempts=how.attempts,
            )
        except UserError as error:
            field = error.field.replace("--endpoint", "judge.url").replace("--", "judge.")
            raise UserError(error.what, field=field, hint=error.hint) from None
    return Replies(folder / "judge", [how.model, request], endpoint)


def report(config: JudgedSuite, found: Found) -> tuple[dict[str, Any], list[Table]]:
    """(results as JSON, tables) of all questions.

    Raises:
      UserError: a kind without a rule, the judge cannot be used, or there is no reply at all.
    """
    asked, known = cases(config, found), rules(config)
    judged_by = replies(config, found.folder)
    messages = {
        (case.key, swapped): _messages(config, case, known, swapped)
        for case in asked
        for swapped in (False, True)
    }
    kinds = {case.key: case.kind for case in asked}
    judged_by.ask(
        Question(text, {"key": key, "kind": kinds[key], "model_first": swapped})
        for (key, swapped), text in messages.items()
    )
    said = {place: judged_by.text(text) for place, text in messages.items()}
    if all(text is None for text in said.values()):
        hint = "Set --config.judge.url and --config.judge.model"
        raise UserError("there is no reply of this judge", field="judge.url", hint=hint)
    order = dict.fromkeys([*config.kinds, *kinds.values()])
    results = {kind: scored([c for c in asked if c.kind == kind], said) for kind in order}
    results = {kind: one for kind, one in results.items() if one["questions"]}
    results[ALL] = scored(asked, said)
    about = {
        "judge": judged_by.identity,
        "prompts": checksum.of_json([_system(config), known]),
        "answers": checksum.of_json([[case.key, case.answer] for case in asked]),
    }
    pairs = {case.key: [said[case.key, False], said[case.key, True]] for case in asked}
    failed = sum(one.failures for one in found.sets.values())
    whole = {"hashes": about, "kinds": results, "failed": failed, "replies": pairs}
    return whole, [_main(results, about, failed), _places(results)]


def _system(config: JudgedSuite) -> str:
    return config.judge.system or judge.SYSTEM


def _messages(
    config: JudgedSuite, case: Case, known: Mapping[str, Mapping[str, str]], swapped: bool
) -> list[dict[str, str]]:
    rule = known.get(case.kind, known.get("default"))
    if rule is None:
        hint = f"The rules have: {', '.join(known)}"
        raise UserError(f"no rule for questions of the kind {case.kind!r}", hint=hint)
    content = judge.content(case, rule, swapped)
    return [{"role": "system", "content": _system(config)}, {"role": "user", "content": content}]


def scored(asked: Sequence[Case], said: Mapping[tuple[str, bool], str | None]) -> dict[str, Any]:
    """Both numbers of some questions as JSON.

    Args:
      asked: the questions.
      said: the replies by (key, whether the model's answer came first); None where there is none.
    """
    first = [reply for case in asked if (reply := said[case.key, False]) is not None]
    judged, excluded, unanswered = [], 0, 0
    for case in asked:
        both = said[case.key, False], said[case.key, True]
        one, other = (judge.pair(text) if text is not None else None for text in both)
        if None in both:
            unanswered += 1
        elif one is None or other is None:
            excluded += 1
        else:
            judged.append(Judged(case.key, case.kind, one, other[::-1]))
    return {
        "questions": len(asked),
        "llava": judge.llava([judge.llava_pair(reply) for reply in first]),
        "both_orders": measure.plain(judge.relative(judged).estimate()),
        "excluded": excluded,
        "unanswered": unanswered,
        "bias": measure.plain(judge.bias(judged)),
        "agreement": measure.plain(judge.agreement(judged)),
        **judge.outcomes(judged),
    }


def _main(results: Mapping[str, Any], about: Mapping[str, str], failed: int) -> Table:
    head = ("", "LLaVA's formula", "reference", "model", "read as -1", "both orders [95 %]")
    head += ("excluded", "no reply", "questions")
    rows = []
    for kind, one in results.items():
        formula = one["llava"]
        rows.append(
            (
                Cell(kind),
                *(_number(formula[name], 1 if name == "score" else 2)
                  for name in ("score", "reference", "model")),
                Cell(str(formula["unreadable"])),
                interval(one["both_orders"], decimals=1),
                Cell(str(one["excluded"])),
                Cell(str(one["unanswered"])),
                Cell(str(one["questions"])),
            )
        )  # fmt: skip
    note = (
        "The model's points in percent of the reference answer's. LLaVA's formula asks with the "
        "reference first, and counts a reply that cannot be read as -1 for both. Both orders: a "
        "question counts where both replies can be read. Hashes: "
        + ", ".join(f"{name} {text}" for name, text in about.items())
        + (
            f". {failed} questions could not be answered and are judged as empty."
            if failed
            else "."
        )
    )
    return Table("Relative score", note, head, tuple(rows))


def _places(results: Mapping[str, Any]) -> Table:
    head = ("", "points for the first place [95 %]", "same winner in both orders % [95 %]")
    head += ("wins", "ties", "losses")
    rows = tuple(
        (
            Cell(kind),
            interval(one["bias"]),
            interval(one["agreement"], 100, 1),
            *(Cell(str(one[name])) for name in ("wins", "ties", "losses")),
        )
        for kind, one in results.items()
    )
    note = "Wins: questions in which the model has more points than the reference in both orders "
    return Table("How far the judge can be trusted", note + "together.", head, rows)


def _number(value: float | None, decimals: int) -> Cell:
    return Cell(NONE if value is None else f"{value:.{decimals}f}")
