"""VSDial-CN: VisDial in Chinese with spoken questions, the set that the paper made.

    PATH/visdial_1.0_SPLIT.json        VisDial's own form with speech files (see visdial.py), or
    PATH/SPLIT_vsdial_asr_zh*.json     the reference repository's form (see reference.py): questions
    PATH/SPLIT_vsdial_zh*.json         dialogues about images
    PATH/images/, features/, audio/    the media of that form, unless the options name others

Linked by github.com/phellonchen/X-LLM; VisDial is CC BY 4.0, its images come from COCO. Where only
features are published, name the folder of the sounds you have by `audio`: see reference.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files
from xllm_jax.data.sources import reference, visdial

FILES = {"asr": "vsdial_asr_zh", "spoken": "vsdial_zh", "masr": "vsdial_zh"}
BESIDE = ("coco",)  # may lie next to PATH


def examples(
    path: str,
    split: str = "train",
    kind: str = "spoken",
    images: str = "",
    features: str = "",
    audio: str = "",
    history: bool = False,
) -> Sequence[Example]:
    """Examples of a split, in the order of its file.

    Args:
      path: folder of one of the layouts above.
      split: 'train', 'val' or 'test'.
      kind: 'asr' (the spoken question alone), 'spoken' (image and spoken question) or 'masr' (the
        spoken question recognized with its image, reference form only).
      images, features, audio: folders of the media, if they lie elsewhere.
      history: give the earlier rounds of VisDial's form; the other form always has them.

    Raises:
      UserError: unknown kind, no such file, and what the two readers raise.
    """
    if kind not in FILES:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint=f"Choices: {', '.join(FILES)}")
    root = pathlib.Path(path)
    if (root / f"visdial_1.0_{split}.json").is_file() and kind != "masr":
        return visdial.examples(path, split, kind, images, history)
    pattern = f"{split}_{FILES[kind]}*.json"
    found = litter.glob(root, pattern)
    if not found:
        raise files.missing(root / pattern, (f"visdial_1.0_{split}.json",))

    def folder(given: str, name: str) -> str:
        return given or (str(root / name) if (root / name).is_dir() else "")

    return reference.examples(
        str(found[0]),
        split,
        "masr" if kind == "masr" else "",
        folder(images, "images"),
        folder(features, "features"),
        folder(audio, "audio"),
    )
