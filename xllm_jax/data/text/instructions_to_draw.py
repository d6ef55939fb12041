"""Captions as requests to draw: named wordings of the request and of the answer to it."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

CAPTION, RUN = "{caption}", "{run}"


@dataclasses.dataclass(frozen=True)
class Wording:
    """Ways to ask for a picture and to answer.

    Attributes:
      requests: with `{caption}` for what is to be drawn.
      replies: with `{run}` for the picture.
    """

    requests: tuple[str, ...]
    replies: tuple[str, ...]


_VERBS = ("draw", "paint", "sketch", "create", "make", "show me", "generate", "illustrate")
_PLEAS = (
    "Please {verb} {{caption}}",
    "Can you {verb} {{caption}}?",
    "I want you to {verb} {{caption}}",
)

WORDINGS = {
    "zh": Wording(
        requests=(
            "画{caption}",
            "请画{caption}",
            "画一张图：{caption}",
            "请画一张图：{caption}",
            "请生成一张图片：{caption}",
            "我想看一张图片：{caption}",
            "能不能画一张这样的图：{caption}",
            "请根据描述画图：{caption}",
        ),
        replies=(
            "好的，{run}",
            "好的，这是图片：{run}",
            "{run}这是您要的图片。",
            "当然可以：{run}",
        ),
    ),
    "en": Wording(
        requests=tuple(plea.format(verb=verb) for verb in _VERBS for plea in _PLEAS),
        replies=(
            "Sure thing! {run}",
            "Here you are: {run}",
            "Of course. {run}",
            "{run} Here is what you asked for.",
        ),
    ),
    # The caption alone is the request, as in NExT-GPT's first version.
    "caption": Wording(requests=(CAPTION,), replies=(RUN,)),
}


def find(name: str, field: str) -> Wording:
    """The named wording.

    Raises:
      UserError: there is none of that name.
    """
    if name not in WORDINGS:
        what = f"unknown wording {name!r}"
        raise UserError(what, field=field, hint=f"Choices: {', '.join(WORDINGS)}")
    return WORDINGS[name]


def request(
    key: str,
    caption: str,
    modality: str,
    wording: Wording,
    echo: bool = False,
    reply: bool = True,
    said: str = "",
    picture: str = "",
) -> Example:
    """A request to draw a caption, always in the same words.

    Args:
      key: of the example, which chooses the words.
      caption: what is to be drawn.
      modality: of the picture.
      wording: the choice.
      echo: the answer says the caption before the picture, so that the LLM's states there are about
        it, instead of one of the wording's replies.
      reply: False answers with the picture alone.
      said: how it is asked for, where that is not the caption itself.
      picture: file that shows it.
    """
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    asked, answer = (
        one[int(generator.integers(len(one)))] for one in (wording.requests, wording.replies)
    )
    answer = f"{caption} {RUN}" if echo else answer if reply else RUN
    return Example(
        key,
        instruction=asked.replace(CAPTION, said or caption),
        answer=answer.replace(RUN, f"<{modality}>"),
        task="draw",
        outputs=((modality, caption),),
        pictures=(picture,) if picture else (),
    )
