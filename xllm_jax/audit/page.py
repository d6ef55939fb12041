"""The audit as tables for a terminal and as one HTML page that needs no other file."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from xllm_jax.audit import Audit
from xllm_jax.audit.samples import Medium, Sample
from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching.padding import MOST
from xllm_jax.data.media import speech
from xllm_jax.data.media.modality import View
from xllm_jax.report import media, page, plots, text
from xllm_jax.report.tables import Cell, Table

STYLE = """
.samples { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.prompt { margin: .6rem 0 0; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt .slot { border: 1px dashed var(--accent); color: var(--accent); border-radius: 4px;
  padding: 0 .3rem; }
.prompt .special { color: var(--soft); font-size: .8em; padding: 0 .15rem; }
.prompt mark { background: color-mix(in srgb, var(--good) 22%, transparent); color: inherit;
  border-left: 1px solid var(--good); padding: 0 1px; }
"""
KEY = (
    "Pictures and spectrograms are drawn from the arrays of the batch. Dashed boxes are places "
    "that an interface's embeddings fill. Green tokens, each behind its own bar, are learnt."
)


def shown(found: Audit) -> list[Table]:
    """What was counted, as tables."""
    return [_sources(found), _kinds(found), _padding(found), *_left_out(found)]


def terminal(found: Audit) -> str:
    """The tables as text."""
    return text.report(shown(found))


def render(found: Audit) -> str:
    """The page."""
    bars = "".join(plots.histogram(kind, values) for kind, values in found.counts.lengths.items())
    body = [
        f"<h1>What the model sees in {html.escape(found.name or 'this stage')}</h1>",
        f'<p class="note">{found.counts.batches} batches of the real stream. {KEY}</p>',
        *map(page.table, shown(found)),
        f'<h2>Lengths of examples</h2><div class="curves">{bars}</div>',
        f'<h2>{len(found.samples)} samples</h2><div class="samples">',
        *map(_sample, found.samples),
        "</div>",
    ]
    return page.document("xllm_jax data audit", page.STYLE + STYLE, body)


def _sources(found: Audit) -> Table:
    head = ("source", "records", "looked at", "silent", "in batches", "supervised", "share")
    rows = []
    for name, one in found.sources.items():
        met = found.counts.examples[name]
        tokens = found.counts.tokens.get(name, {}).get("supervised", 0)
        share = f"{found.counts.supervised_share(name):.1%}" if met else "—"
        silent = Cell(str(one.silent), False if one.silent else None)
        numbers = (met, tokens)
        rows.append(
            (Cell(name), Cell(f"{one.size:,}"), Cell(str(one.looked_at)), silent)
            + tuple(Cell(f"{n:,}") for n in numbers)
            + (Cell(share),)
        )
    note = f"{found.counts.supervised_share():.1%} of all tokens are supervised."
    return Table("Supervision", note, head, tuple(rows))


def _kinds(found: Audit) -> Table:
    head = ("kind", "total", "examples", "least", "median", "95 %", "most")
    rows = []
    for kind, values in found.counts.lengths.items():
        marks = (min(values), *np.percentile(values, (50, 95)), max(values))
        numbers = (found.counts.total(kind), len(values), *marks)
        rows.append((Cell(kind), *(Cell(f"{n:,.0f}") for n in numbers)))
    cut = found.counts.cut
    note = f"{cut:,} tokens of long text were cut." if cut else ""
    return Table("Tokens, modality by modality", note, head, tuple(rows))


def _padding(found: Audit) -> Table:
    waste = found.counts.waste
    rows = tuple(
        (Cell(kind), Cell(f"{waste.used[kind]:,}"), Cell(f"{waste.capacity[kind]:,}"))
        + (Cell(f"{share:.1%}", False if share > MOST else None),)
        for kind, share in waste.shares().items()
    )
    return Table("Padding", waste.warning(), ("places for", "used", "places", "waste"), rows)


def _left_out(found: Audit) -> list[Table]:
    rows = tuple(
        (Cell(reason[:120]), Cell(str(count), False))
        for reason, count in found.counts.skipped.most_common(20)
    )
    return [Table("Left out of the batches", "", ("reason", "records"), rows)] if rows else []


def _sample(sample: Sample) -> str:
    files = "".join(
        _files([one for one in sample.media if one.modality == name])
        for name in dict.fromkeys(one.modality for one in sample.media)
    )
    words = "".join(_piece(kind, said) for kind, said in sample.pieces)
    counts = [f"{count} {kind}" for kind, count in sample.tokens.items() if count]
    foot = " · ".join([f"{sample.source}: {sample.key}", sample.task, *counts])
    return (
        f'<article class="sample">{files}<p class="prompt">{words}</p>'
        f"<footer>{html.escape(foot)}</footer></article>"
    )


def _piece(kind: str, said: str) -> str:
    said = html.escape(said)
    if kind == "learnt":
        return f"<mark>{said}</mark>"
    return said if kind == "words" else f'<span class="{kind}">{said}</span>'


def _files(items: list[Medium]) -> str:
    """The items of one modality."""
    drawn = "".join(map(_DRAWN[items[0].kind.view], items))
    return f'<div class="frames">{drawn}</div>' if items[0].kind.view == "frames" else drawn


def _picture(item: Medium) -> str:
    return f'<img class="picture" alt="{html.escape(item.modality)}" src="{_uri(item)}">'


def _frame(item: Medium) -> str:
    return f'<img alt="frame" src="{_uri(item)}">'


def _uri(item: Medium) -> str:
    return media.picture(Image.fromarray(item.values))


def _vectors(item: Medium) -> str:
    said = f"{item.kind.contents or item.modality}, {len(item.values)} vectors"
    return f'<p class="note">{html.escape(f"{said}: {os.path.basename(item.path)}")}</p>'


def _plot(item: Medium) -> str:
    return plots.channels(os.path.basename(item.path), item.values.T.tolist())


def _sound(item: Medium) -> str:
    drawn = f'<img class="sound" alt="spectrogram" src="{media.shade(item.values)}">'
    try:
        samples = speech.read(item.path)
    except UserError as error:  # features that were computed elsewhere have no sound
        return f'{drawn}<p class="note">{html.escape(str(error))}</p>'
    return f'{drawn}<audio controls preload="none" src="{_wave(samples)}"></audio>'


_DRAWN: dict[View, Callable[[Medium], str]] = {
    "picture": _picture,
    "frames": _frame,
    "sound": _sound,
    "plot": _plot,
    "vectors": _vectors,
}


def _wave(samples: np.ndarray) -> str:
    """16 kHz samples on the 16-bit scale as a WAV data URI."""
    import soundfile

    buffer = io.BytesIO()
    whole = np.clip(samples, -32768, 32767).astype(np.int16)
    soundfile.write(buffer, whole, speech.RATE, format="WAV")
    return media.uri(buffer.getvalue(), "audio/wav")


def write(found: Audit, directory: str | Path) -> Path:
    """Writes audit.html into a folder, made if needed; returns its path."""
    file = Path(directory) / "audit.html"
    atomic.write_text(file, render(found))
    return file
