"""Drawn pictures beside real ones of the same captions, by features of CLIP.

FID, CLIP score and R@1, each with what it is worth: captions of other samples, noise for drawings,
and the real pictures. Where projected embeddings lie beside the drawings, R@1 says how
often they are nearer to the text encoder's embeddings of their own caption than to those of any
other. A sample without a drawing scores nothing, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import PictureSuite
from xllm_jax.data.example import Example
from xllm_jax.data.media import image
from xllm_jax.evaluation import bootstrap, measure, picture_scores, scorers
from xllm_jax.evaluation.clip_base import ClipBase
from xllm_jax.evaluation.suites.run import Found, Model, samples
from xllm_jax.report.suite_page import interval
from xllm_jax.report.tables import NONE, Cell, Table

TITLE = "Drawn pictures"
ASKS = False  # a model: it reads what was drawn
UNSAFE = re.compile(r"[^\w.-]")
FEWEST = 2  # pictures that have a spread


def tasks(config: PictureSuite, model: Model | None = None) -> dict[str, tuple[Example, ...]]:
    """The captioned real pictures.

    Raises:
      UserError: no set is there; no drawings or no CLIP are named.
    """
    for name, what in (("drawn", "drawings"), ("clip", "a base of CLIP")):
        if not getattr(config, name):
            raise UserError("is missing", field=name, hint=f"Name a folder of {what}")
    if not Path(config.drawn).is_dir():
        raise UserError("no such folder", field="drawn", hint="Draw first: docs/evaluation.md")
    return samples(config)


def file_of(folder: str, key: str, suffix: str) -> Path:
    """Where the drawing of a sample lies; what no file name holds everywhere is '_'."""
    return Path(folder) / f"{UNSAFE.sub('_', key)}{suffix}"


def report(config: PictureSuite, found: Found) -> tuple[dict[str, Any], list[Table]]:
    """(results as JSON, tables) of all sets.

    Raises:
      UserError: a picture that cannot be read, no drawing at all, what `ClipBase` raises.
    """
    clip = ClipBase(config.clip, config.tokenizer)
    sets = {name: scored(config, clip, one.examples) for name, one in found.sets.items()}
    names = {name: config.titles.get(name, name) for name in sets}
    rows = {"clip": clip.identity, "sets": sets}
    made = [_scores(sets, names), _distances(sets, names)]
    return rows, made


def scored(config: PictureSuite, clip: ClipBase, examples: Sequence[Example]) -> dict[str, Any]:
    """One set as JSON."""
    files = [file_of(config.drawn, example.key, ".png") for example in examples]
    there = [file.is_file() for file in files]
    captions = [scorers.references(example)[0] for example in examples]
    found: dict[str, Any] = {"samples": len(examples), "missing": len(there) - sum(there)}
    if any(there):
        texts = clip.texts(captions, config.batch)
        real = _features(clip, [Path(e.media[0][1]) for e in examples], config.batch)
        drawn = np.zeros_like(real)
        drawn[there] = _features(clip, [f for f, one in zip(files, there) if one], config.batch)
        found["clip_score"] = _pairs(picture_scores.cosines, 100.0, drawn, real, texts)
        found["recall"] = _pairs(_recalls, 1.0, drawn, real, texts)
        found["fid"] = _fid(real, drawn[there], _noise(clip, len(real), config.batch))
    recalled = _projected(config, examples)
    if recalled is not None:
        found["projected"] = recalled
    if len(found) == 2:
        hint = "A sample NAME is drawn as NAME.png, its embeddings are NAME.npz"
        raise UserError("has no drawing of any sample", field=config.drawn, hint=hint)
    return found


def _features(clip: ClipBase, files: Sequence[Path], batch: int) -> np.ndarray:
    """`[N, D]`; pictures are read a batch at a time, since they have all sizes."""
    made = []
    for start in range(0, len(files), batch):
        read = [image.read(str(file)) for file in files[start : start + batch]]
        squares = [image.center(one, clip.side) for one in read]
        made.append(clip.images(np.stack(squares), batch))
    return np.concatenate(made)


def _noise(clip: ClipBase, count: int, batch: int) -> np.ndarray:
    """Features of pictures of noise."""
    shape = (count, clip.side, clip.side, 3)
    return clip.images(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8), batch)


def _recalls(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Whether each picture is nearest to its own caption; two equal captions both miss."""
    return picture_scores.recall_at_1(images, texts).astype(np.float64)


def _pairs(
    score: picture_scores.Score, most: float, drawn: np.ndarray, real: np.ndarray, texts: np.ndarray
) -> dict[str, Any]:
    """A score of pairs with its controls: other samples' captions, and the real pictures."""
    others = picture_scores.shuffled(texts)
    rows = {"value": (drawn, texts), "shuffled": (drawn, others), "real": (real, texts)}
    found = {name: _estimate(np.asarray(score(*pair)), most) for name, pair in rows.items()}
    return {**found["value"], "shuffled": found["shuffled"], "real": found["real"]}


def _estimate(values: np.ndarray, most: float) -> dict[str, Any]:
    low = min(0.0, float(values.min(initial=0.0)))
    ends = np.array([[low, 1.0], [most, 1.0]])
    sums = np.stack([values, np.ones_like(values)], axis=1)
    return measure.plain(bootstrap.estimate(sums, bootstrap.rate, ends=ends))


def _fid(real: np.ndarray, drawn: np.ndarray, noise: np.ndarray) -> dict[str, float | None]:
    """FID of the drawings, of noise, and of the two halves of the real pictures."""
    pairs = {"value": (real, drawn), "noise": (real, noise), "halves": (real[::2], real[1::2])}
    enough = lambda pair: min(map(len, pair)) >= FEWEST  # noqa: E731
    return {n: picture_scores.fid(*p) if enough(p) else None for n, p in pairs.items()}


def _projected(config: PictureSuite, examples: Sequence[Example]) -> dict[str, Any] | None:
    """R@1 of projected embeddings against those of the captions; None where there are none."""
    if not config.wanted:
        return None
    made, wanted = (
        [_embeddings(file_of(folder, example.key, ".npz")) for example in examples]
        for folder in (config.drawn, config.wanted)
    )
    shape = next((one.shape for one in wanted if one is not None), None)
    if shape is None or any(one is None for one in wanted):
        hint = "One file NAME.npz with prompt_embeds for every sample"
        raise UserError("lacks embeddings of captions", field="wanted", hint=hint)
    shapes = {one.shape for one in [*made, *wanted] if one is not None}
    if len(shapes) > 1:
        what = f"embeddings of several shapes: {sorted(shapes)}"
        raise UserError(what, field="wanted", hint="Take one encoder for both")
    # What was not projected is nearest to nothing.
    rows = np.stack([np.full(shape, 0.0) if one is None else one for one in made])
    targets = np.stack([one for one in wanted if one is not None])
    missing = np.array([one is None for one in made])
    hits = picture_scores.recall_at_1(rows, targets) & ~missing
    wrong = picture_scores.recall_at_1(rows, picture_scores.shuffled(targets)) & ~missing
    return {
        **_estimate(hits.astype(np.float64), 1.0),
        "missing": int(missing.sum()),
        "shuffled": _estimate(wrong.astype(np.float64), 1.0),
    }


def _embeddings(file: Path) -> np.ndarray | None:
    """`prompt_embeds` of a file as `xllm generate --draw` writes it."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as held:
            return np.asarray(held["prompt_embeds"], np.float64)[0]
    except Exception:  # what NumPy raises on damaged files has no bounds
        hint = "The .npz of xllm generate --draw"
        raise UserError("holds no embeddings", field=str(file), hint=hint) from None


def _scores(sets: dict[str, Any], names: dict[str, str]) -> Table:
    head = ("", "[95 %]", "shuffled captions", "real pictures", "samples", "not drawn")
    kinds = (("clip_score", "CLIP score", 1, 2), ("recall", "R@1 %, CLIP", 100, 1))
    kinds += (("projected", "R@1 %, projected embeddings", 100, 1),)
    rows = []
    for name, one in sets.items():
        for kind, title, scale, decimals in kinds:
            if kind in one:
                rows.append(
                    (
                        Cell(f"{names[name]}: {title}"),
                        interval(one[kind], scale, decimals),
                        interval(one[kind]["shuffled"], scale, decimals),
                        interval(one[kind]["real"], scale, decimals)
                        if "real" in one[kind]
                        else Cell(NONE),
                        Cell(str(one["samples"])),
                        Cell(str(one[kind].get("missing", one["missing"]))),
                    )
                )
    note = "What was not drawn scores 0. The CLIP score is 100 times the mean cosine."
    return Table("Drawings and their captions", note, head, tuple(rows))


def _distances(sets: dict[str, Any], names: dict[str, str]) -> Table:
    head = ("", "drawings", "noise", "two halves of the real pictures")
    rows = tuple(
        (Cell(names[name]), *(_number(one["fid"][kind]) for kind in ("value", "noise", "halves")))
        for name, one in sets.items()
        if "fid" in one
    )
    note = "Of this CLIP's features: it compares with other runs, not with published FIDs."
    return Table("FID", note, head, rows)


def _number(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.2f}")
