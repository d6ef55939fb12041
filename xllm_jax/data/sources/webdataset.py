"""Image captions in tar files (webdataset), as img2dataset writes them.

    PATH/SPLIT/00000.tar, 00001.tar …    or PATH/*.tar for 'train', or one folder deeper
      000000000.jpg                      the image
      000000000.txt                      its caption, or
      000000000.json                     {"caption": …}

Made by `img2dataset --url_list=… --url_col=url --caption_col=caption --output_format=webdataset`
(github.com/rom1504/img2dataset, MIT) from lists of links; the images belong to their sites.
The tars are not unpacked: their members' offsets are read once, kept beside them in .index
(when the folder can be written to) and every image is then read from its place.
"""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths
from xllm_jax.data.rows import json_text, tar_index, translated
from xllm_jax.data.rows.lazy import Chain, Lazy
from xllm_jax.data.rows.tar_index import COLUMNS
from xllm_jax.data.sources import layout

# Headers whose content tarfile reads whole.
ATTRIBUTES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)
ATTRIBUTES += (tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LONGEST = 1 << 20  # bytes of it


def examples(path: str, split: str = "train", captions: str = "") -> Sequence[Example]:
    """Captioned images, tar by tar; samples without an image or a caption are left out.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no tars, a damaged tar, no captioned image; on access, an empty or broken caption.
    """
    root = layout.split_folder(pathlib.Path(path), split)
    tars = _tars(root)
    if not tars:
        raise UserError("has no tar files", field=str(root), hint="Check the path and the split")
    found = layout.not_empty(Chain([_read(tar, root) for tar in tars]), root, "captioned images")
    return translated.examples(found, captions, split)


def has_tars(path: str, split: str) -> bool:
    """Whether a folder is of this layout."""
    root = pathlib.Path(path)
    inside = root / split if (root / split).is_dir() else root
    return bool(_tars(inside))


def _tars(root: pathlib.Path) -> list[pathlib.Path]:
    """The folder's tars, or those of its folders, which are not other splits."""
    below = [t for t in litter.glob(root, "*/*.tar") if t.parent.name not in ("val", "test")]
    return litter.glob(root, "*.tar") or below


def index(tar: pathlib.Path) -> np.ndarray:
    """Places of the captioned images of a tar: `[samples, COLUMNS]` int64, in the tar's order.

    Raises:
      UserError: the tar is damaged.
    """
    return tar_index.kept(tar, _scan)


class _Member(tarfile.TarInfo):
    """A member's header, whose name or attributes are of a length that can be meant."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        """Reads the header, as `TarInfo` does, before what belongs to it is read."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in ATTRIBUTES and found.size > LONGEST:
            raise tarfile.ReadError(f"a name or attributes of {found.size:,} bytes")
        return found


def _scan(tar: pathlib.Path) -> np.ndarray:
    samples: dict[str, list[int]] = {}
    size, left = tar.stat().st_size, litter.LeftOut(tar)
    try:
        with tarfile.open(tar, "r:", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                # Otherwise it remembers every member.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if member.isfile() and not left.takes(member.name, member.size):
                    _note(samples, member)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no member at byte {archive.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        hint = "Download it again, or take it away"
        raise UserError(f"is a damaged tar ({error})", field=str(tar), hint=hint) from error
    left.report()
    whole = [row for row in samples.values() if row[0] and row[2]]
    return np.asarray(whole, np.int64).reshape(-1, COLUMNS)


def _note(samples: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    """Takes down one member; its sample is what stands before the name's first dot."""
    folder, name = os.path.split(member.name)
    stem, _, suffix = name.partition(".")
    row = samples.setdefault(os.path.join(folder, stem), [0] * COLUMNS)
    place = [member.offset_data, member.size]
    suffix = f".{suffix.lower()}"
    if suffix in layout.IMAGES:
        row[:2] = place
    elif suffix == ".txt" or (suffix == ".json" and not row[2]):
        row[2:] = [*place, int(suffix == ".json")]


def _read(tar: pathlib.Path, root: pathlib.Path) -> Lazy:
    places, name = index(tar), tar.relative_to(root).with_suffix("").as_posix()

    def example(number: int) -> Example:
        offset, length, text, size, is_json = places[number].tolist()
        key = f"{name}/{number}"
        where = f"{tar}: sample {number}"
        caption = _caption(paths.read(paths.part(tar, text, size)), bool(is_json), where)
        return layout.captioned_image(key, paths.part(tar, offset, length), caption, where)

    return Lazy(len(places), example)


def _caption(content: bytes, is_json: bool, where: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason})", field=where) from None
    return layout.get(json_text.parsed(text, where), "caption", str, where) if is_json else text
