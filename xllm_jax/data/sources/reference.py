"""The JSON files of the reference repository (github.com/phellonchen/X-LLM), told by their keys.

    PATH, or PATH/SPLIT.json: a list of
      {"image", "caption": text or list, "image_id", "dataset"}       captions; for Flickr30k_zh and
                                                                      MUGE_zh the image as base64
      {"image_id", "caption_zh"}                                      instructions: images or videos
      {"speech_feats_path", "target_text", "utterance_id", "length"}  ASR; with "image" beside it
                                                                      multimodal ASR (MASR)
      {"speech_feats_path", "image_path", "question_text", "answer_text", "history_text"}
                                                                      VSD, and MASR by kind='masr'

The repository links the files and the media they need; licenses are those of the sets they were
made from. Paths in them are its authors', so name your folders: files are found there by their last
part. "speech_feats_path" is a `.npy` of features that CIF has made (`data/media/cif_features.py`):
it becomes a medium 'cif', which `data.speech_features='cif'` reads, or, with the option `audio`,
the utterance's own sound file.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

KINDS = ("", "masr")
PACKED = ("Flickr30k_zh", "MUGE_zh")
ROUND = re.compile("问题：|回复：")


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the media lie; '' keeps the paths of the file, relative to its folder."""

    base: str
    images: str = ""
    features: str = ""
    videos: str = ""
    sounds: dict[str, str] | None = None


def examples(
    path: str,
    split: str = "train",
    kind: str = "",
    images: str = "",
    features: str = "",
    audio: str = "",
    videos: str = "",
) -> Sequence[Example]:
    """Examples of one file, in its order; the keys of a row tell its form.

    Args:
      path: file or folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: '' or 'masr': dialogue rows are there for recognition, their question is the answer.
      images: folder of the images; train2014 and val2014 in it are looked into, too.
      features: folder of the `.npy` files.
      audio: folder of sound files called by utterance_id, or as the `.npy` files are; they take the
        features' place.
      videos: folder of the videos: rows of image_id and caption_zh are about videos.

    Raises:
      UserError: unknown kind, no such file, no JSON list; on access, a row of no known form, a
        missing or empty text, no sound file.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint="Choices: '' and masr")
    root = pathlib.Path(path)
    rows = Rows(root if root.is_file() else root / f"{split}.json")
    sounds = _sounds(audio) if audio else None
    folders = Folders(str(rows.path.parent), images, features, videos, sounds)

    def example(index: int) -> Example:
        row, where = rows[index], rows.place(index)
        if isinstance(row, dict) and "speech_feats_path" in row:
            key = str(row.get("utterance_id", "spoken"))
            return _spoken(row, f"{key}-{index}", where, folders, kind)
        return _captioned(row, str(index), where, folders)

    return layout.not_empty(Lazy(len(rows), example), rows.path, "rows")


def _sounds(audio: str) -> dict[str, str]:
    return layout.files([layout.first_folder([pathlib.Path(audio)])], layout.SOUNDS)


def _captioned(row: dict, key: str, where: str, folders: Folders) -> Example:
    if isinstance(row, dict) and "caption_zh" in row:
        name = layout.get(row, "image_id", str, where)
        said = [layout.get(row, "caption_zh", str, where).strip()]
        if folders.videos:
            medium = ("video", os.path.join(folders.videos, f"{name}.mp4"))
        else:
            medium = ("image", _image(f"{name}.jpg", folders))
    else:
        captions = layout.get(row, "caption", (str, list), where)
        captions = [captions] if isinstance(captions, str) else captions
        said = [one.strip() if isinstance(one, str) else "" for one in captions]
        image = layout.get(row, "image", str, where)
        packed = row.get("dataset") in PACKED
        medium = ("image", _packed(image, where) if packed else _image(image, folders))
    if not said or not all(said):
        raise UserError("has an empty caption", field=where)
    task = "video_caption" if medium[0] == "video" else "caption"
    return layout.captioned(key, (medium,), said, task, False)[0]


def _spoken(row: dict, key: str, where: str, folders: Folders, kind: str) -> Example:
    speech = _speech(row, where, folders)
    image = row.get("image_path", row.get("image"))
    media = (("image", _image(str(image), folders)), speech) if image else (speech,)
    said = "question_text" if "question_text" in row else "target_text"
    transcript = layout.unpunctuated(layout.get(row, said, str, where))
    dialogue = "answer_text" in row and kind != "masr"
    answer = layout.get(row, "answer_text", str, where).strip() if dialogue else transcript
    if not answer or not transcript:
        raise UserError("has an empty text", field=where)
    return Example(
        key,
        media,
        answer=answer,
        task="spoken_vqa" if dialogue else "asr",
        history=_history(row, where) if dialogue else (),
        references=(answer,),
        transcript=transcript,
    )


def _history(row: dict, where: str) -> tuple[tuple[str, str], ...]:
    """Earlier rounds from '问题：…回复：…问题：…回复：…'."""
    texts = [text.strip() for text in ROUND.split(str(row.get("history_text") or ""))]
    texts = texts[1:] if texts and not texts[0] else texts
    if len(texts) % 2:
        raise UserError("is a question without an answer", field=f"{where}.history_text")
    return tuple(zip(texts[::2], texts[1::2]))


def _speech(row: dict, where: str, folders: Folders) -> tuple[str, str]:
    path = layout.get(row, "speech_feats_path", str, where)
    name = os.path.basename(path)
    if folders.sounds is None:
        known = os.path.join(folders.features, name) if folders.features else path
        return "cif", os.path.join(folders.base, known)
    for stem in (str(row.get("utterance_id", "")), os.path.splitext(name)[0]):
        if stem in folders.sounds:
            return "speech", folders.sounds[stem]
    hint = "Name the folder of the sound files by the option 'audio'"
    raise UserError(f"no sound file of {name}", field=where, hint=hint)


def _image(path: str, folders: Folders) -> str:
    if not folders.images:
        return os.path.join(folders.base, path)
    name = os.path.basename(path)
    whole = os.path.join(folders.images, path)  # an absolute path stays what it is
    year = "train2014" if "train" in name else "val2014"
    places = [os.path.join(folders.images, *inside, name) for inside in ((year,), ())]
    found = [place for place in (whole, *places) if os.path.isfile(place)]
    return found[0] if found else places[-1]


def _packed(image: str, where: str) -> paths.Carried:
    try:
        return paths.Carried(where, base64.b64decode(image, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise UserError(f"is not base64 ({error})", field=f"{where}.image") from None
