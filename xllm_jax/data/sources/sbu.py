"""SBU captions: a million links to Flickr with captions, images that users download.

    PATH/*.tar or PATH/train/*.tar             what img2dataset made of it (see webdataset.py), or
    PATH/sbu-captions-all.json                 {"image_urls": […], "captions": […]}, or
    PATH/SBU_captioned_photo_dataset_urls.txt, SBU_captioned_photo_dataset_captions.txt
    PATH/images/                               the images, called as the last part of their link:
                                               4385058960_b0f291553e.jpg

From www.cs.rice.edu/~vo9/sbucaptions; no license is stated, the photographs keep their owners'.
Rows without an image are left out. The paper trains on Chinese translations: the option `captions`,
a file with one line for each row of the list.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import json_spans, translated
from xllm_jax.data.rows.lazy import FileRows, Lines, Spans
from xllm_jax.data.sources import cc3m, layout, webdataset

JSON = "sbu-captions-all.json"
LINKS = "SBU_captioned_photo_dataset_urls.txt"
TEXTS = "SBU_captioned_photo_dataset_captions.txt"


def examples(
    path: str, split: str = "train", images: str = "", captions: str = ""
) -> Sequence[Example]:
    """Captioned images, in the order of the tars or of the list.

    Args:
      path: folder of one of the layouts above.
      split: 'train'; the set has no other, unless it was packed into tars.
      images: folder of the images, if it lies elsewhere.
      captions: file of other captions, line by line those of the list; or a
        translation, as the recipe 'translated' writes it.

    Raises:
      UserError: no such split, file or folder, broken JSON, no image of any row, lists that are not
        of one length; on access, an empty caption.
    """
    own, translation = translated.told_apart(captions)
    if webdataset.has_tars(path, split):
        if own:
            raise UserError(
                "does not go with tars", field=own, hint="Give a translation, or the list"
            )
        return webdataset.examples(path, split, translation)
    if split != "train":
        raise UserError(f"has no split {split!r}", field=path, hint="Choices: train")
    root = pathlib.Path(path)
    links, said = _lists(root)
    said = Lines(own) if own else said
    if len(links) != len(said):
        what = f"has {len(said)} captions for {len(links)} links"
        raise UserError(what, field=own or str(root), hint="One caption for each link")
    # A link that cannot be read has no image, like a dead one.
    names = [
        link.strip().rsplit("/", 1)[-1] if isinstance(link, str) else "" for link in links.tried()
    ]
    folder = layout.first_folder([pathlib.Path(images)] if images else [root / "images", root])

    def caption(index: int) -> str:
        text = said[index]
        if not isinstance(text, str):
            raise UserError("is no text", field=said.place(index))
        return text

    def key(name: str) -> str | None:
        return name if name.lower().endswith(layout.IMAGES) else None

    found = cc3m.downloaded(len(names), caption, folder, names, key)
    return translated.examples(found, translation, split)


def _lists(root: pathlib.Path) -> tuple[FileRows, FileRows]:
    file = layout.first_file(root, (LINKS, JSON, f"*/{LINKS}", f"*/{JSON}"))
    if file.name == LINKS:
        return Lines(file), Lines(file.with_name(TEXTS))
    wanted = ("image_urls", "captions")
    found = json_spans.find(file, dict.fromkeys(wanted))
    links, said = (Spans(file, found[name].spans, name) for name in wanted)
    return links, said
