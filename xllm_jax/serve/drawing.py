"""`POST /v1/images/generations`, and pictures within the answers of a chat."""

from __future__ import annotations

import base64
import io
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as Incoming
from fastapi.responses import JSONResponse, Response
from PIL import Image

from xllm_jax.assembly import networks
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.data.example import Example
from xllm_jax.inference import decoder_base, render
from xllm_jax.inference.decoder_base import DecoderBase
from xllm_jax.serve import chat, errors, openai_schema, service
from xllm_jax.serve.errors import wrong
from xllm_jax.serve.openai_schema import ImageRequest
from xllm_jax.serve.request import Sampling
from xllm_jax.serve.service import Service

SIZE = re.compile(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})")
MOST = 1024  # pixels of a side


class Easel:
    """Draws the pictures of answers with the decoders that a run names.

    Args:
      stage: of the run.
      steps, guidance: as of `Renderer`.

    Raises:
      UserError: a decoder does not fit the run.
    """

    def __init__(self, stage: Stage, steps: int = 50, guidance: float = 7.5):
        self.steps, self.guidance = steps, guidance
        self.bases = {name: _base(stage, name) for name in drawable(stage)}
        self.renderers = {name: base.renderer() for name, base in self.bases.items()}

    def __call__(
        self, pictures: Sequence[Any], seeds: Sequence[int], size: str | None
    ) -> list[bytes]:
        """PNG files of pictures.

        Args:
          pictures: of answers; those without a decoder are left out.
          seeds: one for each.
          size: 'WIDTHxHEIGHT'; None for what the decoder was trained on.

        Raises:
          UserError: a size that the decoder cannot draw.
        """
        made = []
        for picture, seed in zip(pictures, seeds, strict=True):
            base = self.bases.get(picture.modality)
            if base is None:
                continue
            sides = _sides(size, base)
            options: Mapping[str, Any] = {"steps": self.steps, "guidance": self.guidance}
            renderer = self.renderers[picture.modality]
            drawn = renderer(picture.embeddings[None], [seed], size=sides, **options)
            made.append(_png(drawn[0]))
        return made


def drawable(stage: Stage) -> list[str]:
    """Modalities of a run's answers that have a decoder."""
    return sorted(name for name, out in stage.outputs.items() if out.decoder)


def _base(stage: Stage, name: str) -> DecoderBase:
    out = stage.outputs[name]
    base = decoder_base.look(out.decoder, "", stage.compute, stage.frozen)
    projection = networks.network(stage.parts[out.projection], stage, out.projection)
    base.check_projection(projection.output_width, projection.queries, f"outputs.{name}.decoder")
    return base


def _sides(size: str | None, base: DecoderBase) -> tuple[int, int]:
    """(height, width) of OpenAI's 'WIDTHxHEIGHT'."""
    found = SIZE.fullmatch(size or "")
    if size in (None, "", "auto"):
        return base.size
    sides = (int(found[2]), int(found[1])) if found else (0, 0)
    if not found or max(sides) > MOST:
        raise UserError("is no size", field="size", hint=f"WIDTHxHEIGHT up to {MOST}")
    render.check_size(sides, base.autoencoder.factor)
    return sides


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def router(served: Service) -> APIRouter:
    """The route, for one model."""
    routes = APIRouter()

    @routes.post("/v1/images/generations")
    async def generate(incoming: Incoming) -> Response:
        return await _generate(served, incoming)

    return routes


async def _generate(served: Service, incoming: Incoming) -> Response:
    asked = incoming.state.asked
    served.check_ready()
    wanted = await chat.body(incoming, ImageRequest)
    openai_schema.check_model(wanted.model, served.card.name)
    if served.draw is None:
        raise wrong("This model draws no pictures", "model", "unsupported_modality")
    if wanted.response_format == "url":
        raise wrong("response_format: only b64_json", "response_format")
    count = 1 if wanted.n is None else wanted.n
    if not 0 < count <= served.limits.choices:
        raise wrong(f"n: is not between 1 and {served.limits.choices}", "n")
    if not wanted.prompt.strip() or len(wanted.prompt) > served.limits.text:
        raise wrong("prompt: is empty or too long", "prompt")
    example = Example(asked.id, (), wanted.prompt, task="draw")
    tickets = served.submit(asked, example, [Sampling()])
    (found,) = await service.unless_gone(incoming, service.answers(tickets))
    if not found.pictures:
        raise wrong("The model answered without a picture", "prompt", "no_picture")
    first = secrets.randbits(32) if wanted.seed is None else wanted.seed
    seeds = [(first + number) % 2**32 for number in range(count)]
    pictures = [found.pictures[0]] * count
    try:
        drawn = await service.in_turn(served, served.draw, pictures, seeds, wanted.size)
    except UserError as error:
        raise errors.of(error) from None
    data = [{"b64_json": base64.b64encode(one).decode()} for one in drawn]
    return JSONResponse({"created": int(time.time()), "data": data})
