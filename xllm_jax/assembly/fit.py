"""Whether data, encoders, interfaces and LLM of a stage fit together, before anything is compiled.

Networks say what they take in plain attributes, and what a network does not say is not looked at:
an encoder `INPUT` ({setting of the data: its value}), `bins`, `patch` and `image_size`,
`most_frames` and `width`; an interface `encoder_width`, `llm_width` and `made_of`; an LLM `width`
and `position_axes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.data.media import modalities
from xllm_jax.data.text import llm_family, templates
from xllm_jax.models.xllm import LLM, XLLM

DEFAULTS = {"image.normalization": "clip", "speech.features": "kaldi"}
"""Of the settings that an encoder may ask for."""
VIDEO, SPEECH = "video", modalities.SPEECH
PICTURES = ("image", VIDEO)
CONVERSATION = "conversation"  # the batch format that has a template


def check(stage: Stage, xllm: XLLM) -> None:
    """Looks at every modality of a stage.

    Args:
      stage: the settings.
      xllm: its networks.

    Raises:
      UserError: an encoder gets other media than it takes, an interface other features, or the LLM
        embeddings of another width or number, or texts or a template of another family; names the
        field.
    """
    _family(stage.data, xllm)
    for modality, encoder, interface in routes(stage, xllm):
        read, made = xllm.networks[encoder], xllm.networks[interface]
        if modality in PICTURES:
            _pictures(stage.data, modality, encoder, read)
        given = modality == SPEECH and modalities.featured(stage.data)
        if modality == SPEECH and not given:
            _sounds(stage.data, encoder, read)
        if not given:  # else the files' width counts
            _width(xllm, interface, "encoder_width", encoder)
        _width(xllm, interface, "llm_width", LLM)
        _embeddings(stage.data, modality, interface, read, made)


def routes(stage: Stage, xllm: XLLM) -> list[tuple[str, str, str]]:
    """(modality, encoder, interface); those of the ASR model of stage 1 have their own names.

    Args:
      stage: the settings.
      xllm: its networks.
    """
    asr = (SPEECH, "speech_encoder", "speech_interface")
    heard = stage.objective == "asr" and set(asr[1:]) <= xllm.networks.keys()
    return [*xllm.modalities, *([asr] if heard else [])]


def _pictures(data: Data, modality: str, part: str, encoder: nn.Module) -> None:
    options = _options(data, modality)
    _input(options, part, encoder, "image")
    patch, size = getattr(encoder, "patch", None), options.get("size", 224)
    if patch and size % patch and size != getattr(encoder, "image_size", None):
        what = f"is {size}, and {part} has patches of {patch} pixels"
        hint = f"Say a multiple, such as {max(1, round(size / patch)) * patch}"
        raise UserError(what, field="data.image.size", hint=hint)


def _sounds(data: Data, part: str, encoder: nn.Module) -> None:
    _input(data.speech, part, encoder, "speech")
    wanted, found = getattr(encoder, "bins", None), data.speech.get("bins", 80)
    if wanted and wanted != found:
        what = f"is {found}, and {part} reads {wanted} bins"
        hint = f"Say --config.data.speech.bins={wanted}"
        raise UserError(what, field="data.speech.bins", hint=hint)
    most = getattr(encoder, "most_frames", None)
    if most and data.frames[-1] > most:
        what = f"is {data.frames[-1]}, and {part} has places for {most} frames"
        hint = f"Say at most {most}, and leave out longer sounds or cut them"
        raise UserError(what, field="data.frames", hint=hint)


def _family(data: Data, xllm: XLLM) -> None:
    """Positions as the LLM reads them (ChatGLM's have two numbers, a causal decoder's one), and
    the words around a question."""
    wanted = getattr(xllm.networks.get(LLM), "position_axes", None)
    family = llm_family.find(data) if LLM in xllm.networks else None
    if family and wanted and len(family.position_step) != wanted:
        name = type(xllm.networks[LLM]).__name__
        what = f"{data.llm_family!r} is of another family than {LLM} ({name})"
        hint = "docs/llms.md has llm_family and template of every LLM"
        raise UserError(what, field="data.llm_family", hint=hint)
    if family and data.batch_format == CONVERSATION:
        templates.check_family(data.template, family)


def _options(data: Data, modality: str) -> dict[str, Any]:
    return {**data.image, **(data.video if modality == VIDEO else {})}


def _input(options: Mapping[str, Any], part: str, encoder: nn.Module, field: str) -> None:
    """What an encoder asks of the settings of its data, such as how pictures are normalized."""
    for name, wanted in getattr(encoder, "INPUT", {}).items():
        place, _, option = name.partition(".")
        found = options.get(option, DEFAULTS[name])
        if place == field and found != wanted:
            what = f"is {found!r}, and {part} ({type(encoder).__name__}) reads {wanted!r}"
            raise UserError(what, field=f"data.{name}", hint=f"Say --config.data.{name}={wanted}")


def _width(xllm: XLLM, interface: str, name: str, other: str) -> None:
    """Features as wide as the interface reads them, or embeddings as wide as the LLM does."""
    have = getattr(xllm.networks[interface], name, None)
    wanted = getattr(xllm.networks.get(other), "width", None)
    if have and wanted and have != wanted:
        flag = f"--config.parts.{interface}.fields.{name}={wanted}"
        what = f"is {have}, and {other} has {wanted}"
        raise UserError(what, field=f"parts.{interface}.fields.{name}", hint=f"Say {flag}")


def _embeddings(
    data: Data, modality: str, part: str, encoder: nn.Module, interface: nn.Module
) -> None:
    """As many embeddings of an item as `data.embeddings` has places for."""
    places = data.embeddings.get(modality)
    if not places or not hasattr(interface, "made_of"):
        return
    count = interface.made_of(_features(data, modality, encoder))
    if count > 0 and count != places:
        what = f"is {places}, and {part} makes {count} of an item"
        hint = f"Say --config.data.embeddings.{modality}={count}"
        raise UserError(what, field=f"data.embeddings.{modality}", hint=hint)


def _features(data: Data, modality: str, encoder: nn.Module) -> int:
    """Features of a picture; 0 where the encoder does not tell."""
    count = getattr(encoder, "features_of", None)
    return count(_options(data, modality).get("size", 224)) if count else 0
