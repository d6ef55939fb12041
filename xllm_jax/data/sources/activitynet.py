"""ActivityNet Captions: sentences about spans of 20 thousand YouTube videos.

    PATH/train.json, val_1.json, val_2.json     {"v_QOlSCBRmfWY": {"duration": seconds,
                                                  "timestamps": [[start, end], …],
                                                  "sentences": [text, …]}, …}
    PATH/videos/, or any folder below PATH      the videos, v_QOlSCBRmfWY.mp4 (.mkv, .webm)

As mirrors have it: these files one folder deeper, or as activitynet_captions_train.json,
…_val1.json and …_val2.json; videos without "v_".

From cs.stanford.edu/people/ranjaykrishna/densevid (captions, for research) and activity-net.org
(videos, on request; they belong to those who uploaded them). 'val' is val_1, 'test' is val_2, the
second set of captions of the same videos. Videos that are gone from YouTube, and therefore not
there, are left out. The option `captions` reads another file of the form, such as a translation.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.json_spans import CUT
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

NAMES = {
    "train": ("train.json", "activitynet_captions_train.json"),
    "val": ("val_1.json", "activitynet_captions_val1.json", "activitynet_captions_val_1.json"),
    "test": ("val_2.json", "activitynet_captions_val2.json", "activitynet_captions_val_2.json"),
}
KINDS = ("clips", "whole")


def examples(
    path: str, split: str = "train", kind: str = "clips", videos: str = "", captions: str = ""
) -> Sequence[Example]:
    """Described videos, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: 'clips' (one example for each sentence, its video cut to the sentence's span) or 'whole'
        (one for each video, described by all its sentences).
      videos: folder of the videos, if it lies elsewhere.
      captions: file of other captions, or a translation, as the recipe 'translated' writes it.

    Raises:
      UserError: unknown kind, no such file, broken JSON, no video; on access, a missing key, a
        span without length, an empty sentence.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint=f"Choices: {', '.join(KINDS)}")
    root = pathlib.Path(path)
    own, translation = translated.told_apart(captions)
    file = pathlib.Path(own) if own else _file(root, split)
    rows = Rows(file, lambda row: _count(row, kind), objects=True)
    if rows.names is None:
        raise UserError("is not an object of videos", field=str(file))
    names = rows.names
    there = layout.files([pathlib.Path(videos) if videos else root], layout.VIDEOS)
    there |= {f"v_{name}": path for name, path in there.items() if not name.startswith("v_")}
    wanted = [place for place, name in enumerate(names) if name in there or name == CUT]
    places = np.repeat(np.asarray(wanted, np.int64), rows.measures[wanted])
    firsts = np.cumsum(rows.measures[wanted]) - rows.measures[wanted]
    inside = np.arange(len(places)) - np.repeat(firsts, rows.measures[wanted])

    def example(index: int) -> Example:
        place, number = int(places[index]), int(inside[index])
        row, name, where = rows[place], names[place], rows.place(place)
        sentences = layout.get(row, "sentences", list, where)
        layout.check_few(sentences, where)
        if kind == "whole":
            said = _joined(sentences, where)
            media = (("video", there[name]),)
            return Example(name, media, answer=said, task="video_caption", references=(said,))
        said = _sentence(sentences, number, where)
        media = (("video", paths.span(there[name], *_span(row, number, where))),)
        key = f"{name}#{number}"
        return Example(key, media, answer=said, task="video_caption", references=(said,))

    found = layout.not_empty(Lazy(len(places), example), root, f"videos of {file.name}")
    return translated.examples(found, translation, split)


def _file(root: pathlib.Path, split: str) -> pathlib.Path:
    names = NAMES[split]
    return layout.first_file(root, [*names, *(f"*/{name}" for name in names)])


def _sentence(sentences: list, number: int, where: str) -> str:
    said = sentences[number] if number < len(sentences) else None
    if not isinstance(said, str) or not said.strip():
        raise UserError("has an empty sentence", field=f"{where}.sentences[{number}]")
    return said.strip()


def _joined(sentences: list, where: str) -> str:
    """All sentences as one text; languages of ASCII letters have spaces between them."""
    said = [_sentence(sentences, number, where) for number in range(max(len(sentences), 1))]
    return " ".join(said) if said[0].isascii() else "".join(said)


def _count(row: object, kind: str) -> int:
    """Examples of a video; a broken row counts once, and is reported when it is read."""
    sentences = row.get("sentences") if isinstance(row, dict) and kind == "clips" else None
    return max(len(sentences), 1) if isinstance(sentences, list) and layout.few(sentences) else 1


def _span(row: dict, number: int, where: str) -> tuple[float, float]:
    spans = layout.get(row, "timestamps", list, where)
    try:
        start, end = (float(value) for value in spans[number])
    except (IndexError, TypeError, ValueError, OverflowError):
        what = f"has no start and end of sentence {number}"
        raise UserError(what, field=f"{where}.timestamps") from None
    if not 0 <= start < end < math.inf:
        what = f"sentence {number} lasts from {start} s to {end} s"
        raise UserError(what, field=f"{where}.timestamps")
    return start, end
