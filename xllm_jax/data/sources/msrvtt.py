"""MSR-VTT: 10 thousand web videos with 20 sentences each.

    PATH/*videodatainfo.json            {"videos": [{"video_id", "split"}, …],
                                         "sentences": [{"video_id", "caption"}, …]}
    PATH/TrainValVideo/, TestVideo/     the videos, VIDEO_ID.mp4 (or any folder below PATH)

As mirrors have it: all of it in one MSRVTT_data.json (CLIP4Clip's, whose videos lie in
MSRVTT_Videos/ or elsewhere below PATH), in MSR_VTT.json (COCO's form), or in lists of
{"video", "caption"} (msrvtt_train_9k.json, cap_train.json …). Where a mirror does not say the split
of a video, its number does: train to 6512, val to 7009, test from 7010. CLIP4Clip's lists beside
them (MSRVTT_train.9k.csv, or .7k.csv, and MSRVTT_JSFUSION_test.csv) say it otherwise: see
msrvtt_lists.py. Beside a list of 9k, 'val' has no videos left.

By Microsoft Research, for research; mirrored by github.com/ArrowLuo/CLIP4Clip, which the reference
repository links. Splits are called train, validate and test in the files. Our own worlds add "tags"
to videos.
"""

from __future__ import annotations

import fnmatch
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.joined_lists import Groups
from xllm_jax.data.rows.lazy import Chain, Lazy
from xllm_jax.data.rows.names import Names
from xllm_jax.data.sources import captioned_list, layout, msrvtt_lists

NAMES = {"val": "validate"}
FILES, FIRST, COCO_FORM = "*videodatainfo*.json", "train_val_videodatainfo.json", "MSR_VTT.json"
MIRRORS = (
    *("*/*videodatainfo*.json", "MSRVTT_data.json", "*/MSRVTT_data.json"),
    *("msrvtt_data.json", COCO_FORM, f"*/{COCO_FORM}"),
)
LISTS = {
    "train": ("msrvtt_train_9k.json", "msrvtt_train_7k.json", "cap_train.json"),
    "val": ("msrvtt_val*.json", "cap_val.json"),
    "test": ("msrvtt_test_1k.json", "cap_test.json"),
}
KEYS = ("videos", "video_id", "sentences", "video_id")
COCO_KEYS = ("images", "id", "annotations", "image_id")
STARTS = ((7010, "test"), (6513, "validate"), (0, "train"))  # the first video of each split


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
    files = Names(videos or root, _stem)
    each = split == "train" if per_caption is None else per_caption

    def place(name: str) -> str:
        (at,) = files.find([_stem(name) or name])
        # A file that is not there is reported when it is opened.
        return files.path(at) if at >= 0 else str(root / (name if _stem(name) else f"{name}.mp4"))

    tables = msrvtt_lists.tables(root)
    if msrvtt_lists.has_sentences(tables.get(split)):
        found = msrvtt_lists.read(tables[split], place, each)
    else:
        names = [*MIRRORS, *LISTS.get(split, ())]
        infos = litter.glob(root, FILES) or [layout.first_file(root, [FIRST, *names])]
        chosen, broken = msrvtt_lists.chooser(tables, split)
        read = [_read(info, NAMES.get(split, split), place, each, chosen) for info in infos]
        found = layout.with_broken(Chain(read), broken)
    found = layout.not_empty(found, root, f"videos with sentences of split {split!r}")
    return translated.examples(found, captions, split)


def _stem(name: str) -> str | None:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in layout.VIDEOS else None


def _official(name: object) -> str:
    """The split of a video by its number, where a mirror does not say it."""
    number = str(name).removeprefix("video")
    place = int(number) if number.isascii() and number.isdigit() and len(number) < 9 else 0
    return next(split for first, split in STARTS if place >= first)


def _read(
    info: pathlib.Path,
    split: str,
    place: Callable[[str], str],
    each: bool,
    chosen: Callable[[str, bool], bool],
) -> Sequence:
    if any(fnmatch.fnmatch(info.name, pattern) for names in LISTS.values() for pattern in names):
        return captioned_list.read(info, "video", place, each)
    coco = info.name == COCO_FORM
    videos, key, sentences, named = COCO_KEYS if coco else KEYS

    def wanted(row: dict) -> bool:
        said = row.get("split", _official(row.get(key))) == split
        return chosen(str(row.get(key)), said)

    groups = Groups(info, (videos, key, wanted), (sentences, named))
    count = len(groups) if each else len(groups.whole)

    def example(index: int) -> Example:
        if index >= count:
            raise _lost(groups, *groups.lost[index - count], {"above": key, "below": named})
        group, number = groups.group(index) if each else (index, 0)
        video = groups.above[int(groups.whole[group])]
        name = str(video[key])
        said, at, _ = layout.grouped(groups, group, number if each else None)
        media, tags = (("video", place(name)),), layout.tags(video)
        return layout.captioned(name, media, said, "video_caption", each, tags)[at]

    return Lazy(count + len(groups.lost), example)


def _lost(groups: Groups, which: str, place: int, keys: Mapping[str, str]) -> UserError:
    """Why a row is not part of any video's sentences."""
    rows = groups.above if which == "above" else groups.below
    try:
        name = layout.get(rows[place], keys[which], str, rows.place(place))
    except UserError as error:
        return error
    return UserError(f"{name} is not in the list of videos", field=rows.place(place))
