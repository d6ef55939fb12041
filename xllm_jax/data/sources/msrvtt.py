"""MSR-VTT: 10 thousand web videos with 20 sentences each.

    PATH/*videodatainfo.json            {"videos": [{"video_id", "split"}, …],
                                         "sentences": [{"video_id", "caption"}, …]}
    PATH/TrainValVideo/, TestVideo/     the videos, VIDEO_ID.mp4 (or any folder below PATH)

By Microsoft Research, for research; mirrored by github.com/ArrowLuo/CLIP4Clip, which the reference
repository links. Splits are called train, validate and test in the files. Our own worlds add "tags"
to videos.
"""

from __future__ import annotations

import pathlib

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout

NAMES = {"val": "validate"}


def examples(
    path: str, split: str = "train", videos: str = "", per_caption: bool | None = None
) -> list[Example]:
    """Video captions of a split, in the order of the videos.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      videos: folder of the videos, if it lies elsewhere.
      per_caption: one example for each sentence; default in training only.

    Raises:
      UserError: no such file, broken JSON, a missing key, a sentence of no video.
    """
    root = pathlib.Path(path)
    infos = sorted(root.glob("*videodatainfo*.json")) or [root / "train_val_videodatainfo.json"]
    files = layout.files([pathlib.Path(videos) if videos else root], layout.VIDEOS)
    each = split == "train" if per_caption is None else per_caption
    found: list[Example] = []
    for info in infos:
        found += _read(info, NAMES.get(split, split), files, root, each)
    return layout.not_empty(found, root, f"videos with sentences of split {split!r}")


def _read(info, split: str, files: dict[str, str], root: pathlib.Path, each: bool) -> list[Example]:
    data = layout.read_json(info)
    chosen: dict[str, tuple[str, ...]] = {}
    known = set()
    for index, row in enumerate(layout.get(data, "videos", list, str(info))):
        where = f"{info}: videos[{index}]"
        name = layout.get(row, "video_id", str, where)
        known.add(name)
        if layout.get(row, "split", str, where) == split:
            chosen[name] = layout.tags(row)
    sentences: dict[str, list[str]] = {}
    for index, row in enumerate(layout.get(data, "sentences", list, str(info))):
        where = f"{info}: sentences[{index}]"
        name = layout.get(row, "video_id", str, where)
        if name not in known:
            raise UserError(f"{name} is not in the list of videos", field=where)
        sentences.setdefault(name, []).append(layout.get(row, "caption", str, where).strip())
    found: list[Example] = []
    for name, tags in chosen.items():
        # A file that is not there is reported when it is opened.
        media = (("video", files.get(name, str(root / f"{name}.mp4"))),)
        said = sentences.get(name, [])
        found += layout.captioned(name, media, said, "video_caption", each, tags)
    return found
