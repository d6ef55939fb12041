"""What the tables of the report hold, as data: titles, heads, rows of cells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

NONE = "—"
NO_DATA = "no data"  # it was measured, but there was nothing to score

# What each metric is called, and by what its value is multiplied when shown.
METRICS = {
    "cer": ("CER %", 100),
    "accuracy": ("accuracy %", 100),
    "cider": ("CIDEr-D", 1),
    "bleu4": ("BLEU-4 %", 100),
    "objects": ("objects F1 %", 100),
    "looks": ("count, shape and color right %", 100),
    "places": ("in place, too %", 100),
    "itm": ("ITM right %", 100),
    "r1_text": ("caption found, R@1 %", 100),
    "r1_image": ("picture found, R@1 %", 100),
    "itg": ("ITG pieces right %", 100),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Words of a table, and whether they are good news: True, False or None."""

    text: str
    good: bool | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its name."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A claim of the demo: a metric's bound, and bounds of its controls."""

    title: str
    measure: str
    metric: str
    bound: float
    controls: Mapping[str, float] = dataclasses.field(default_factory=dict)


GOALS = (
    # Ten points above the answer that is always the same.
    Goal("Image-text matching (ITM) after stage 1", "pairs@stage1", "itm", 2 / 3 + 0.1),
    Goal("Stage-1 speech recognition, CER", "sentences@asr", "cer", 0.05),
    Goal("X-LLM speech recognition (S), CER", "sentences@after", "cer", 0.09),
    Goal("Visual question answering", "vqa@after", "accuracy", 0.88, {"blind": 0.40}),
    Goal("Spoken visual question answering, before stage 3", "spoken@before", "accuracy", 0.45),
    Goal("Spoken visual question answering, after stage 3", "spoken@after", "accuracy", 0.78),
    Goal(
        "Video captions, object and motion right",
        "video@after",
        "accuracy",
        0.72,
        {"blind": 0.20, "shuffled": 0.20},
    ),
    Goal(
        "Requests to draw: count, shape and color right",
        "drawing",
        "looks",
        0.80,
        {"shuffled": 0.15, "unconditional": 0.10},
    ),
    Goal("Requests to draw that name places: these, too", "drawing", "places", 0.70),
    Goal("Pictures to draw again in another color", "drawing_edits", "looks", 0.60),
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A difference, named as in 'comparisons', that lies above 0."""

    title: str
    name: str
    metric: str


CLAIMS = (
    Claim("Initialized above “no init”, captions (CIDEr-D)", "init_cider", "cider"),
    Claim("Initialized above “no init”, visual questions", "init_vqa", "accuracy"),
    Claim("All pairs above half of them, captions (CIDEr-D)", "pairs_cider", "cider"),
    Claim("All pairs above half of them, visual questions", "pairs_vqa", "accuracy"),
    Claim("Stage 3 improves spoken visual question answering", "stage3_spoken", "accuracy"),
    Claim("Stage 3 improves transcripts beside pictures (S+V)", "stage3_transcripts", "cer"),
    Claim("Spoken questions before stage 3 above their best control", "zero_shot", "accuracy"),
    Claim("Drawn right, above 90 % of what the captions give", "drawing_ceiling", "looks"),
    Claim("Spoken requests, above 85 % of the written ones", "drawing_spoken", "looks"),
)
TABLE1 = (
    ("image interface initialized (stage 1)", "before"),
    ("half of the pairs", "half"),
    ("half of the pairs, no init", "no_init"),
)
TABLE1_COLUMNS = (
    ("caption", "cider"),
    ("caption", "bleu4"),
    ("caption", "objects"),
    ("vqa", "accuracy"),
)
TABLE4 = (
    ("ASR model of stage 1", "asr"),
    ("X-LLM, before stage 3", "before"),
    ("X-LLM, after stage 3", "after"),
)
TABLE4_COLUMNS = (
    ("sentences", "sentences (S)"),
    ("questions", "questions (S)"),
    ("questions_image", "questions (S+V)"),
)
CONTROLLED = ("measured [95 %]", "samples", "blind", "shuffled", "chance")
DRAWN = ("ceiling", "shuffled", "unconditional")
TEXT = (("vqa", "accuracy"), ("caption", "cider"))
DETAILS = (
    "drawing",
    "vqa@after",
    "spoken@after",
    "video@after",
    "sentences@after",
    "sentences@asr",
)


def build(results: Mapping[str, Any]) -> list[Table]:
    """All tables that the results have something for."""
    measures = results.get("measures", {})
    how = f"CER: {results['cer']}." if "cer" in results else ""
    made = [
        goals(measures, results.get("comparisons", {})),
        table1(measures, results.get("comparisons", {})),
        table4(measures, how),
        drawing(measures),
        text_ability(measures, results.get("comparisons", {})),
        everything(measures, how),
        *(details(name, measures[name]) for name in DETAILS if name in measures),
        timings(results.get("timings", {})),
    ]
    return [table for table in made if table.rows]


def number(entry: Mapping[str, Any] | None, metric: str, interval: bool = False) -> str:
    """'87.5' or '87.5 [84.1, 90.2]', '—' where there is nothing."""
    if not entry:
        return NONE
    if not scored(entry):
        return NO_DATA
    scale = METRICS[metric][1]
    digits = 1 if scale == 100 else 2
    shown = f"{entry['value'] * scale:.{digits}f}"
    if not interval:
        return shown
    return f"{shown} [{entry['low'] * scale:.{digits}f}, {entry['high'] * scale:.{digits}f}]"


def scored(entry: Mapping[str, Any]) -> bool:
    """Whether there was anything to score; files of earlier versions say NaN where not."""
    return entry["value"] is not None and not math.isnan(entry["value"])


def find(measures: Mapping[str, Any], name: str, metric: str) -> Mapping[str, Any] | None:
    """One metric of one measure, None where it was not measured."""
    return measures.get(name, {}).get("metrics", {}).get(metric)


def goals(measures: Mapping[str, Any], comparisons: Mapping[str, Any]) -> Table:
    """The demo's goals: measured, its controls, met or missed."""
    rows = [goal_row(goal, find(measures, goal.measure, goal.metric)) for goal in GOALS]
    for one in CLAIMS:
        if one.name in comparisons:
            found = comparisons[one.name]
            shown = number(found, found["metric"], interval=True)
            positive = scored(found) and found["value"] > 0
            gain, count = Cell(f"+{shown}" if positive else shown), str(found["samples"])
            row = (Cell(one.title), gain, Cell(count), *[Cell(NONE)] * 3, Cell("> 0"), claim(found))
            rows.append(row)
    head = ("", *CONTROLLED, "goal", "")
    note = (
        "Intervals are about other test samples, not about other training runs. "
        "Blind: the same prompt without the media. Shuffled: with another sample's media. "
        "Chance: the best constant answer."
    )
    measured = tuple(row for row in rows if row)
    return Table("Goals, on the held-out split", note, head, measured)


def claim(found: Mapping[str, Any]) -> Cell:
    """Verdict on a difference that should be positive; certain if its whole interval is."""
    if not scored(found):
        return Cell(NO_DATA, False)
    if found["low"] > 0:
        return Cell("met", True)
    return Cell("within error") if found["value"] > 0 else Cell("missed", False)


def goal_row(goal: Goal, found: Mapping[str, Any] | None) -> tuple[Cell, ...]:
    """One goal; empty where it was not measured."""
    if not found:
        return ()
    higher = found["higher"]
    wanted = f"{'≥' if higher else '≤'} {goal.bound * 100:.0f} %"
    wanted += "".join(f", {name} ≤ {most * 100:.0f} %" for name, most in goal.controls.items())
    return Cell(goal.title), *_controlled(found, goal.metric), Cell(wanted), _verdict(goal, found)


def _verdict(goal: Goal, found: Mapping[str, Any]) -> Cell:
    if not scored(found):
        return Cell(NO_DATA, False)
    met = found["value"] >= goal.bound if found["higher"] else found["value"] <= goal.bound
    for name, most in goal.controls.items():
        control = found.get(name)
        # A control that was not measured proves nothing.
        met = met and (control["value"] if control and scored(control) else 1.0) <= most
    return Cell("met" if met else "missed", met)


def table1(measures: Mapping[str, Any], comparisons: Mapping[str, Any]) -> Table:
    """Effect of the interface's initialization and of more pairs, as the paper's Table 1."""
    rows = []
    for title, model in TABLE1:
        found = [(m, find(measures, f"{task}@{model}", m)) for task, m in TABLE1_COLUMNS]
        if any(entry for _, entry in found):
            cells = (Cell(number(entry, metric, interval=True)) for metric, entry in found)
            rows.append((Cell(title), *cells))
    for title, prefix in (("initialized less no init", "init"), ("all less half", "pairs")):
        names = (f"{prefix}_cider", None, None, f"{prefix}_vqa")
        gains = [comparisons.get(name) if name else None for name in names]
        if any(gains):
            cells = (_margin(gain, metric) for gain, (_, metric) in zip(gains, TABLE1_COLUMNS))
            rows.append((Cell(f"{title}, same samples"), *cells))
    head = ("", *(f"{task} {METRICS[metric][0]}" for task, metric in TABLE1_COLUMNS))
    note = (
        "After stage 2 with as many passes over the pairs; initialized less no init: both with "
        "half of the pairs. 95 % intervals in brackets."
    )
    return Table(
        "Table 1: initializing the image interface, and more pairs", note, head, tuple(rows)
    )


def table4(measures: Mapping[str, Any], how: str) -> Table:
    """Multimodal speech recognition, as the paper's Table 4; `how` says what the CER counts."""
    rows = []
    for title, model in TABLE4:
        found = [find(measures, f"{task}@{model}", "cer") for task, _ in TABLE4_COLUMNS]
        if any(found):
            cells = (Cell(number(entry, "cer", interval=True)) for entry in found)
            rows.append((Cell(title), *cells))
    head = ("CER %", *(title for _, title in TABLE4_COLUMNS))
    note = "S: speech alone. S+V: speech and the image that it is about. Lower is better. " + how
    return Table("Table 4: multimodal speech recognition", note, head, tuple(rows))


def drawing(measures: Mapping[str, Any]) -> Table:
    """What pictures of answers show of what was asked for, beside the decoder's own words."""
    rows = [
        (
            Cell(f"{measure['title']} · {METRICS[metric][0]}"),
            Cell(number(found, metric, interval=True)),
            Cell(str(found["samples"])),
            *(Cell(number(found.get(name), metric)) for name in DRAWN),
        )
        for name, measure in measures.items()
        if name.startswith("drawing")
        for metric, found in measure["metrics"].items()
    ]
    note = (
        "Ceiling: the decoder draws the caption by its own text encoder. Shuffled: the answers' "
        "pictures against other requests. Unconditional: pictures of nothing."
    )
    head = ("", "measured [95 %]", "samples", *DRAWN)
    return Table("Pictures out", note, head, tuple(rows))


def text_ability(measures: Mapping[str, Any], comparisons: Mapping[str, Any]) -> Table:
    """What the same questions are answered once answers may hold pictures."""
    rows = []
    for task, metric in TEXT:
        before, after = (find(measures, f"{task}@{model}", metric) for model in ("after", "draws"))
        if before and after:
            values = (number(one, metric, interval=True) for one in (before, after))
            gain = comparisons.get(f"draws_{task}")
            cells = (*map(Cell, values), Cell(number(gain, metric, interval=True)))
            rows.append((Cell(measures[f"{task}@after"]["title"]), *cells))
    head = ("", "answers in text", "answers that may hold pictures", "difference, same samples")
    return Table("Text, before and after pictures", "", head, tuple(rows))


def everything(measures: Mapping[str, Any], how: str) -> Table:
    """Every measured metric with its controls; `how` says what the CER counts."""
    rows = [
        (
            Cell(f"{measure['title']} · {METRICS[metric][0]}"),
            *_controlled(found, metric),
            _margin(found.get("margin"), metric),
        )
        for measure in measures.values()
        for metric, found in measure["metrics"].items()
    ]
    head = ("", *CONTROLLED, "above control")
    note = "Above control: gain over the best of blind, shuffled and chance, on the same samples. "
    note += how if any("cer" in measure["metrics"] for measure in measures.values()) else ""
    return Table("Everything measured", note, head, tuple(rows))


def _controlled(found: Mapping[str, Any], metric: str) -> Iterator[Cell]:
    """Below the heads of CONTROLLED."""
    yield Cell(number(found, metric, interval=True))
    yield Cell(str(found["samples"]))
    yield from (Cell(number(found.get(name), metric)) for name in CONTROLLED[2:])


def _margin(found: Mapping[str, Any] | None, metric: str) -> Cell:
    return Cell(number(found, metric, interval=True), claim(found).good if found else None)


def details(name: str, measure: Mapping[str, Any]) -> Table:
    """One measure by the tags of its samples."""
    metric, found = next(iter(measure["metrics"].items()))
    rows = tuple(
        (Cell(tag), Cell(number(entry, metric, interval=True)), Cell(str(entry["samples"])))
        for tag, entry in found.get("groups", {}).items()
    )
    head = ("", f"{METRICS[metric][0]} [95 %]", "samples")
    return Table(f"{measure['title']}, by kind of sample", "", head, rows)


def timings(seconds: Mapping[str, float]) -> Table:
    """How long each step took."""
    rows = tuple((Cell(name), Cell(f"{value:.0f} s")) for name, value in seconds.items())
    return Table("Time", "", ("", "wall clock"), rows)
