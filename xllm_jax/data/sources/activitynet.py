"""ActivityNet Captions: sentences about spans of 20 thousand YouTube videos.

    PATH/train.json, val_1.json, val_2.json     {"v_QOlSCBRmfWY": {"duration": seconds,
                                                  "timestamps": [[start, end], …],
                                                  "sentences": [text, …]}, …}
    PATH/videos/, or any folder below PATH      the videos, v_QOlSCBRmfWY.mp4 (.mkv, .webm)

From cs.stanford.edu/people/ranjaykrishna/densevid (captions, for research) and activity-net.org
(videos, on request; they belong to those who uploaded them). 'val' is val_1, 'test' is val_2, the
second set of captions of the same videos. Videos that are gone from YouTube, and therefore not
there, are left out. The option `captions` reads another file of the form, such as a translation.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout

NAMES = {"train": "train.json", "val": "val_1.json", "test": "val_2.json"}
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
      captions: file of other captions.

    Raises:
      UserError: unknown kind, no such file, broken JSON, no video; on access, a missing key, a
        span without length, an empty sentence.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint=f"Choices: {', '.join(KINDS)}")
    root = pathlib.Path(path)
    file = pathlib.Path(captions) if captions else root / NAMES[split]
    data = layout.read_json(file)
    if not isinstance(data, dict):
        raise UserError("is not an object of videos", field=str(file))
    there = layout.files([pathlib.Path(videos) if videos else root], layout.VIDEOS)
    names = [name for name in data if name in there]
    slots = [(name, i) for name in names for i in range(_count(data[name], kind))]

    def example(index: int) -> Example:
        name, number = slots[index]
        where = f"{file}: {name}"
        sentences = layout.get(data[name], "sentences", list, where)
        sentences = [str(one).strip() for one in sentences]
        if not sentences or not all(sentences):
            raise UserError("has an empty sentence", field=where)
        if kind == "whole":
            said = " ".join(sentences) if sentences[0].isascii() else "".join(sentences)
            media = (("video", there[name]),)
            return Example(name, media, answer=said, task="video_caption", references=(said,))
        start, end = _span(data[name], number, where)
        media = (("video", paths.span(there[name], start, end)),)
        said = sentences[number]
        key = f"{name}#{number}"
        return Example(key, media, answer=said, task="video_caption", references=(said,))

    return layout.not_empty(Lazy(len(slots), example), root, f"videos of {file.name}")


def _count(row: Any, kind: str) -> int:
    """Examples of a video; a broken row counts once, and is reported when it is read."""
    sentences = row.get("sentences") if isinstance(row, dict) and kind == "clips" else None
    return max(len(sentences), 1) if isinstance(sentences, list) else 1


def _span(row: dict, number: int, where: str) -> tuple[float, float]:
    spans = layout.get(row, "timestamps", list, where)
    try:
        start, end = (float(value) for value in spans[number])
    except (IndexError, TypeError, ValueError):
        what = f"has no start and end of sentence {number}"
        raise UserError(what, field=f"{where}.timestamps") from None
    if not 0 <= start < end:
        what = f"sentence {number} lasts from {start} s to {end} s"
        raise UserError(what, field=f"{where}.timestamps")
    return start, end
