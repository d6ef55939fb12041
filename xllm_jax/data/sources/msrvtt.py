"""MSR-VTT: 10 thousand web videos with 20 sentences each.

    PATH/*videodatainfo.json            {"videos": [{"video_id", "split"}, …],
                                         "sentences": [{"video_id", "caption"}, …]}
    PATH/TrainValVideo/, TestVideo/     the videos, VIDEO_ID.mp4 (or any folder below PATH)

By Microsoft Research, for research; mirrored by github.com/ArrowLuo/CLIP4Clip, which the reference
repository links. Splits are called train, validate and test in the files. Our own worlds add "tags"
to videos.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.joined_lists import Groups
from xllm_jax.data.rows.lazy import Chain, Lazy
from xllm_jax.data.rows.names import Names
from xllm_jax.data.sources import layout

NAMES = {"val": "validate"}


def examples(
    path: str,
    split: str = "train",
    videos: str = "",
    per_caption: bool | None = None,
    captions: str = "",
) -> Sequence[Example]:
    """Video captions of a split, in the order of the videos.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      videos: folder of the videos, if it lies elsewhere.
      per_caption: one example for each sentence; default in training only.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such file, broken JSON, no video of the split; on access, a missing key, a
        sentence of no video.
    """
    root = pathlib.Path(path)
    infos = litter.glob(root, "*videodatainfo*.json") or [root / "train_val_videodatainfo.json"]
    files = Names(videos or root, _stem)
    each = split == "train" if per_caption is None else per_caption
    wanted = NAMES.get(split, split)
    found = Chain([_read(info, wanted, files, root, each) for info in infos])
    found = layout.not_empty(found, root, f"videos with sentences of split {split!r}")
    return translated.examples(found, captions, split)


def _stem(name: str) -> str | None:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in layout.VIDEOS else None


def _read(info: pathlib.Path, split: str, files: Names, root: pathlib.Path, each: bool) -> Lazy:
    groups = Groups(info, ("videos", "video_id", {"split": split}), ("sentences", "video_id"))
    count = len(groups) if each else len(groups.whole)

    def example(index: int) -> Example:
        if index >= count:
            raise _lost(groups, *groups.lost[index - count])
        group, number = groups.group(index) if each else (index, 0)
        video = groups.above[int(groups.whole[group])]
        name = str(video["video_id"])
        said, place, _ = layout.grouped(groups, group, number if each else None)
        (at,) = files.find([name])
        # A file that is not there is reported when it is opened.
        file = files.path(at) if at >= 0 else str(root / f"{name}.mp4")
        media, tags = (("video", file),), layout.tags(video)
        return layout.captioned(name, media, said, "video_caption", each, tags)[place]

    return Lazy(count + len(groups.lost), example)


def _lost(groups: Groups, which: str, place: int) -> UserError:
    """Why a row is not part of any video's sentences."""
    rows = groups.above if which == "above" else groups.below
    try:
        name = layout.get(rows[place], "video_id", str, rows.place(place))
    except UserError as error:
        return error
    return UserError(f"{name} is not in the list of videos", field=rows.place(place))
