"""The report as one HTML page that needs nothing else: no script, no font, no other file."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities
from xllm_jax.data.media.modality import Modality, View
from xllm_jax.data.synthetic_world import english
from xllm_jax.report import media, plots, tables
from xllm_jax.report.tables import Cell, Table

# Tasks whose samples are shown, in this order.
SAMPLES = (
    *("drawing", "drawing_edits", "drawing_spoken"),
    *("vqa@after", "caption@after", "spoken@after", "video@after", "sentences@after"),
)

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5d6873; --line: #d9dee3;
  --page: #fbfbfa; --card: #ffffff; --good: #1a7f4b; --bad: #b3372e; --accent: #2a5fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #98a3ae; --line: #333b43;
  --page: #14181c; --card: #1b2025; --good: #5cc48d; --bad: #f0857b; --accent: #7eaaf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "PingFang SC", "Hiragino Sans GB",
  "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC",
  "WenQuanYi Micro Hei", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p.note { color: var(--soft); margin: .4rem 0 0; font-size: .86rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(236px, 1fr));
  gap: .9rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .75rem; border-top: 3px solid var(--line); }
.sample.good { border-top-color: var(--good); color: inherit; font-weight: inherit; }
.sample.bad { border-top-color: var(--bad); color: inherit; font-weight: inherit; }
.sample img { display: block; width: 100%; border-radius: 4px; }
.sample img.picture { max-width: 168px; margin: 0 auto; }
.frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3px; }
.drawn { display: flex; gap: .5rem; justify-content: center; margin-top: .4rem; }
.drawn figure { margin: 0; max-width: 50%; text-align: center; }
.sample img.sound { height: 56px; object-fit: fill; }
@media (prefers-color-scheme: dark) { .sample img.sound { filter: invert(1); } }
.sample audio { width: 100%; height: 32px; margin-top: 4px; }
.sample dl { margin: .6rem 0 0; display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem;
  font-size: .88rem; }
.sample dt { color: var(--soft); } .sample dd { margin: 0; }
.sample .gloss { display: block; color: var(--soft); font-size: .82em; font-weight: 400; }
.sample footer { color: var(--soft); font-size: .76rem; margin-top: .5rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 1rem; }
figure.curve { margin: 0; } figcaption { font-size: .86rem; color: var(--soft); }
figcaption b { color: var(--ink); float: right; }
svg { width: 100%; } svg polyline { fill: none; stroke: var(--accent); stroke-width: 1.6; }
svg line { stroke: var(--line); } svg text { fill: var(--soft); font-size: 11px; }
"""


def render(made: Sequence[Table], results: Mapping[str, Any]) -> str:
    """The page.

    Args:
      made: of `tables.build`.
      results: see the package; samples and curves come from there.
    """
    measures, places = results.get("measures", {}), results.get("modalities", {})
    chosen = [measures[name] for name in SAMPLES if name in measures]
    body = [
        "<h1>X-LLM in miniature: what the run measured</h1>",
        '<p class="note">Every number comes from held-out files. Brackets hold 95 % intervals.</p>',
        *map(table, made[:3]),
        *(samples(measure, places) for measure in chosen if measure.get("shown")),
        *map(table, made[3:]),
        curves(results.get("curves", {})),
        settings(results.get("settings", {})),
    ]
    return document("xllm_jax report", STYLE, body)


def document(title: str, style: str, body: Sequence[str]) -> str:
    """A whole page; browsers are told to run no script of it and to fetch nothing for it.

    Args:
      title: of the page.
      style: its style sheet.
      body: pieces of HTML.
    """
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    # A file name whose bytes are no UTF-8 holds lone surrogates, which no file can.
    return page.encode("utf-8", "backslashreplace").decode()


def table(made: Table) -> str:
    """One table."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in made.head)
    rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in made.rows)
    note = f'<p class="note">{html.escape(made.note)}</p>' if made.note else ""
    return (
        f'<h2>{html.escape(made.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def cell(one: Cell) -> str:
    """One cell, colored if it is good or bad news."""
    return f"<td{_class(one.good)}>{html.escape(one.text)}</td>"


def _class(good: bool | None, base: str = "") -> str:
    names = " ".join(filter(None, [base, {True: "good", False: "bad", None: ""}[good]]))
    return f' class="{names}"' if names else ""


def samples(measure: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """Some samples of a task with their files and answers."""
    cards = "".join(sample(entry, places) for entry in measure["shown"])
    return f'<h2>{html.escape(measure["title"])}</h2><div class="samples">{cards}</div>'


def sample(entry: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """One sample."""
    files = "".join(file(modality, path, places) for modality, path in entry["media"])
    files += drawn(entry, places)
    lines = [
        ("said", entry["said"]),
        ("asked", entry["question"]),
        ("answer", entry["answer"] or "(nothing)"),
        ("truth", entry["reference"]),
    ]
    words = "".join(
        f'<dt>{name}</dt><dd{_class(entry["right"] if name == "answer" else None)} lang="zh">'
        f"{html.escape(text)}{_gloss(text)}</dd>"
        for name, text in lines
        if text
    )
    graded = [tables.number({"value": v}, name) for name, v in entry["scores"].items()]
    grades = [f"{tables.METRICS[n][0]} {v}" for n, v in zip(entry["scores"], graded)]
    # An answer that is right or wrong needs no grade.
    tags = html.escape(" · ".join([*(grades if len(grades) > 1 else []), *entry["tags"]]))
    return (
        f"<article{_class(entry['right'], 'sample')}>{files}<dl>{words}</dl>"
        f"<footer>{tags}</footer></article>"
    )


def drawn(entry: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """The picture of an answer, and the ceiling's beside it, where there are any."""
    shown = [(name, entry[name]) for name in ("drawn", "ceiling") if entry.get(name)]
    figures = "".join(
        f"<figure>{file('image', path, places)}<figcaption>{name}</figcaption></figure>"
        for name, path in shown
    )
    return f'<div class="drawn">{figures}</div>' if figures else ""


def _gloss(text: str) -> str:
    """The English of one of the world's sentences, nothing for other texts."""
    meaning = english.gloss(text)
    return f'<span class="gloss" lang="en">{html.escape(meaning)}</span>' if meaning else ""


def file(modality: str, path: str, places: Mapping[str, str]) -> str:
    """One file of a sample; what cannot be read, or is of no known modality, is named instead.

    Args:
      modality, path: of the file.
      places: of the records of further modalities, as in `Data.modalities`.
    """
    known = modalities.stored() | modalities.named(places)
    found = known.get(modality)
    try:
        return _SHOWN[found.view](path, found) if found else _named(path)
    except (OSError, ValueError, RuntimeError, UserError) as error:
        # A report must not fail for one unreadable file.
        return f'<p class="note">{html.escape(f"{path}: {error}")}</p>'


def _image(path: str, _: Modality) -> str:
    return f'<img class="picture" alt="image" src="{media.image(path)}">'


def _video(path: str, _: Modality) -> str:
    shown = "".join(f'<img alt="frame" src="{frame}">' for frame in media.frames(path))
    return f'<div class="frames">{shown}</div>'


def _speech(path: str, _: Modality) -> str:
    return (
        f'<img class="sound" alt="spectrogram" src="{media.spectrogram(path)}">'
        f'<audio controls preload="none" src="{media.sound(path)}"></audio>'
    )


def _plot(path: str, found: Modality) -> str:
    return plots.channels(os.path.basename(path), found.read(path).T.tolist())


def _named(path: str, _: Modality | None = None) -> str:
    return f'<p class="note">{html.escape(path)}</p>'


_SHOWN: dict[View, Callable[[str, Modality], str]] = {
    "picture": _image,
    "frames": _video,
    "sound": _speech,
    "plot": _plot,
    "vectors": _named,
}


def curves(runs: Mapping[str, plots.Points]) -> str:
    """Loss curves of all runs."""
    drawn = "".join(plots.curve(name, points) for name, points in runs.items())
    return f'<h2>Training losses</h2><div class="curves">{drawn}</div>' if drawn else ""


def settings(values: Mapping[str, Any]) -> str:
    """How the run was made."""
    rows = tuple((Cell(name), Cell(str(value))) for name, value in values.items())
    return table(Table("Settings", "", ("", ""), rows)) if rows else ""
