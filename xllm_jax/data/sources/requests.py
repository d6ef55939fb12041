"""Captions of another source as requests to draw what they describe.

    Source("requests", PATH, options={"reader": "cc3m", "options": {…}, "wording": "zh"})

PATH and the split are those of the other reader, one of captioned pictures: cc3m, coco, wukong …
Their pictures are opened by a denoising loss alone (`pixels` of `data.signals`): what a text
encoder makes of the caption is what is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media.reach import Reach
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.text import instructions_to_draw


def examples(
    path: str,
    split: str = "train",
    reader: str = "",
    options: Mapping[str, Any] | None = None,
    wording: str = "zh",
    modality: str = "image",
    echo: bool = False,
    reply: bool = True,
    within: Reach | None = None,
    modalities: Mapping[str, str] | None = None,
) -> Sequence[Example]:
    """One request for each record of the other source, in its order.

    Args:
      path, split: of the other source.
      reader, options: of it.
      wording: name of the words of requests and answers (`data/text/instructions_to_draw.py`).
      modality: in which the answer is.
      echo: the answer says the caption first.
      reply: False answers without words.
      within: what may be read.
      modalities: as of `mixture.read`.

    Raises:
      UserError: unknown reader or wording, and what the reader raises; on access, a record without
        a caption.
    """
    if not reader or reader == "requests":
        hint = "Such as --config.data.sources.NAME.options.reader=coco"
        raise UserError("names no reader of captions", field="options.reader", hint=hint)
    words = instructions_to_draw.find(wording, "options.wording")
    source = Source(reader, path, split, dict(options or {}))
    found = mixture.read(reader, source, "", within, modalities)

    def example(index: int) -> Example:
        one = found[index]
        caption = one.answer.strip()
        if not caption:
            raise UserError("has no caption to be drawn", field=one.key)
        shown = next((path for name, path in one.media if name == modality), "")
        return instructions_to_draw.request(
            one.key, caption, modality, words, echo, reply, picture=shown
        )

    return Lazy(len(found), example)
