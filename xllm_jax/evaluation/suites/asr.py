"""Speech recognition, the paper's Table 4: AISHELL-2 and VSDial-CN, speech alone (S) and with the
image that it is about (S+V).

CER is errors of all utterances over characters of all references. An utterance without an answer
has lost all of its characters.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import SpeechSuite
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import SPEECH
from xllm_jax.data.text.instructions import instructions
from xllm_jax.evaluation import error_rate, measure, paired, scorers, transcript_forms
from xllm_jax.evaluation.answer_store import Answered
from xllm_jax.evaluation.suites.run import Found, Model, samples
from xllm_jax.report.suite_page import difference, interval
from xllm_jax.report.tables import Cell, Table

TITLE = "Speech recognition (Table 4)"
ASKS = True  # a model
SPEAKERS = 40  # rows of a table of speakers; results.json has all
ERRORS = ("replaced", "deleted", "inserted")


def tasks(config: SpeechSuite, model: Model | None = None) -> dict[str, tuple[Example, ...]]:
    """The samples of the sets, as requests to write down what is said.

    Args:
      config: of the suite.
      model: sets with what it does not take are left out.

    Raises:
      UserError: no set is there or none suits the model; a form or an expression that is none.
    """
    transcript_forms.form(config.cer)
    for name, pattern in config.speakers.items():
        _speaker(pattern, name)
    found = {
        name: tuple(_transcribing(row, config.instruction) for row in rows)
        for name, rows in samples(config).items()
        if rows
    }
    takes = model.modalities if model else ()
    suited = {n: rows for n, rows in found.items() if not takes or _modalities(rows) <= {*takes}}
    if not suited:
        what = f"{model.name if model else ''} takes {', '.join(takes)} alone"
        raise UserError(what, field="sets", hint="Take a set with nothing else in it")
    return suited


def _modalities(rows: Sequence[Example]) -> set[str]:
    return {modality for row in rows for modality, _ in row.media}


def _transcribing(example: Example, instruction: str) -> Example:
    """With one instruction for all: a prompt would draw another for every sample."""
    said, asked = scorers.reference(example), instruction or instructions("asr")[0]
    changed = {"task": "asr", "instruction": asked, "answer": said, "history": ()}
    return dataclasses.replace(example, references=(said,), **changed)


def _speaker(pattern: str, name: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(f"is no expression ({error})", field=f"speakers.{name}") from None
    if pattern and not found.groups:
        hint = "Put the part that is the speaker into ( )"
        raise UserError("has no group", field=f"speakers.{name}", hint=hint)
    return found


def report(config: SpeechSuite, found: Found) -> tuple[dict[str, Any], list[Table]]:
    """(results as JSON, tables) of all sets.

    Args:
      config: of the suite.
      found: the answers.
    """
    sets = {n: scored(config, n, one, found.other.get(n)) for n, one in found.sets.items()}
    names = {name: config.titles.get(name, name) for name in sets}
    results = {"cer": transcript_forms.stated(config.cer), "sets": sets}
    groups = [
        table
        for name, one in sets.items()
        for table in (
            _groups(f"{names[name]}, by length of the reference", "characters", one["lengths"]),
            _groups(f"{names[name]}, by speaker", "speaker", one["speakers"]),
        )
    ]
    return results, [_main(config, names, sets), _forms(names, sets), *groups]


def scored(
    config: SpeechSuite, name: str, one: Answered, other: Answered | None = None
) -> dict[str, Any]:
    """One set as JSON.

    Args:
      config: of the suite.
      name: of the set.
      one: its answers.
      other: another run's.
    """
    score = _cer(one, config.cer)
    forms = dict.fromkeys([*error_rate.FORMS, config.cer])
    bring = transcript_forms.form(config.cer)
    pairs = [bring(scorers.reference(e), a) for e, a in zip(one.examples, one.answers)]
    counts = np.array([error_rate.edit_counts(*pair) for pair in pairs], np.int64).reshape(-1, 3)
    found = {
        **_plain(score),
        "characters": int(score.sums[:, 1].sum()),
        "failed": one.failures,
        "errors": {kind: int(n) for kind, n in zip(ERRORS, counts.sum(0))},
        "forms": {form: _plain(_cer(one, form))["value"] for form in forms},
        "lengths": _by_length(config, [len(said) for said, _ in pairs], score),
        "speakers": _by_speaker(config, name, one.examples, score),
    }
    if other is not None:
        before = _cer(other, config.cer)
        found["baseline"] = _plain(before)
        found["gain"] = paired.compared(before, score)
    return found


def _cer(one: Answered, form: str) -> scorers.Score:
    return scorers.transcription(one.answers, one.examples, form)["cer"]


def _plain(score: scorers.Score, chosen: Sequence[int] | None = None) -> dict[str, Any]:
    return measure.plain(score.estimate(chosen))


def _by_length(config: SpeechSuite, lengths: Sequence[int], score: scorers.Score) -> dict[str, Any]:
    """{'6–10': CER} of the groups that have a sample."""
    edges = [0, *sorted({*config.lengths}), 1 << 30]
    found = {}
    for first, stop in itertools.pairwise(edges):
        members = [i for i, length in enumerate(lengths) if first <= length < stop]
        last = "" if stop == edges[-1] else stop - 1
        if members:
            found[f"{first}–{last}" if last != "" else f"{first} and more"] = _plain(score, members)
    return found


def _by_speaker(
    config: SpeechSuite, name: str, examples: Sequence[Example], score: scorers.Score
) -> dict[str, Any]:
    """{speaker: CER}, the worst first; {} where the set has no expression for them."""
    if not config.speakers.get(name):
        return {}
    pattern, members = _speaker(config.speakers[name], name), {}
    for number, example in enumerate(examples):
        path = [path for modality, path in example.media if modality == SPEECH][-1]
        said = pattern.search(str(path))
        members.setdefault(said[1] if said else "unknown", []).append(number)
    found = {speaker: _plain(score, rows) for speaker, rows in members.items()}
    worst = lambda entry: (-(entry[1]["value"] or 0), entry[0])  # noqa: E731
    return dict(sorted(found.items(), key=worst))


def _main(config: SpeechSuite, names: Mapping[str, str], sets: Mapping[str, Any]) -> Table:
    compared = any("gain" in one for one in sets.values())
    head = ("", "CER % [95 %]", "utterances", "failed", *(f"{kind} %" for kind in ERRORS))
    head += ("baseline %", "gain % [95 %]", "p") if compared else ()
    rows = []
    for name, one in sets.items():
        total = max(one["characters"], 1)
        shares = [Cell(f"{100 * one['errors'][kind] / total:.2f}") for kind in ERRORS]
        row = [Cell(names[name]), interval(one, 100), Cell(str(one["samples"]))]
        row += [Cell(str(one["failed"]), False if one["failed"] else None), *shares]
        if "gain" in one:
            row += [interval(one["baseline"], 100), *difference(one["gain"], 100)]
        rows.append((*row, *[Cell("")] * (len(head) - len(row))))
    note = f"Compared: {transcript_forms.stated(config.cer)}. An utterance without an answer counts"
    note += " as deleted."
    if compared:
        note += " Gain: how much lower than the baseline's on the same utterances; p by randomizing"
        note += " whose answer is whose."
    return Table("Character error rate", note, head, tuple(rows))


def _forms(names: Mapping[str, str], sets: Mapping[str, Any]) -> Table:
    """The same answers under every normalization."""
    forms = list(dict.fromkeys(form for one in sets.values() for form in one["forms"]))
    rows = tuple(
        (Cell(names[name]), *(_share(one["forms"].get(form)) for form in forms))
        for name, one in sets.items()
    )
    note = "; ".join(f"{form}: {transcript_forms.stated(form)}" for form in forms)
    return Table("CER % by normalization", note, ("", *forms), rows)


def _share(value: float | None) -> Cell:
    return Cell("no data" if value is None else f"{100 * value:.2f}")


def _groups(title: str, what: str, groups: Mapping[str, Any]) -> Table:
    rows = tuple(
        (Cell(name), interval(one, 100), Cell(str(one["samples"])))
        for name, one in list(groups.items())[:SPEAKERS]
    )
    left = len(groups) - len(rows)
    note = f"The worst {len(rows)}; results.json has {left} more." if left > 0 else ""
    return Table(title, note, (what, "CER % [95 %]", "utterances"), rows)
