"""`POST /v1/images/generations`: what the model answers to a request to draw, drawn."""

from __future__ import annotations

import base64
import secrets
import time

from fastapi import APIRouter
from fastapi import Request as Incoming
from fastapi.responses import JSONResponse, Response

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.serve import chat, errors, openai_schema, service
from xllm_jax.serve.errors import wrong
from xllm_jax.serve.openai_schema import ImageRequest
from xllm_jax.serve.request import Sampling
from xllm_jax.serve.service import Service

IMAGE = "image"  # modality of answers that this route is about


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
    if served.easel is None or IMAGE not in served.easel.sizes:
        raise wrong("This model draws no pictures", "model", "unsupported_modality")
    count = wanted.count(served.limits)
    try:
        size = served.easel.size(wanted.size, IMAGE)
    except UserError as error:
        raise errors.of(error) from None
    example = Example(asked.id, (), wanted.prompt, task="draw")
    tickets = served.submit(asked, example, [Sampling()])
    (found,) = await service.unless_gone(incoming, service.answers(tickets))
    picture = next((one for one in found.pictures if one.modality == IMAGE), None)
    if picture is None:
        raise wrong("The model answered without a picture", "prompt", "no_picture")
    first = secrets.randbits(32) if wanted.seed is None else wanted.seed
    orders = [(picture, first + number, size) for number in range(count)]
    drawn = await service.unless_gone(incoming, served.draw(orders))
    asked.notes |= {"pictures": len(drawn)}
    chat.note(asked, chat.total([found.usage]))
    data = [{"b64_json": base64.b64encode(one).decode()} for one in drawn]
    told = {"created": int(time.time()), "data": data, "output_format": "png"}
    return JSONResponse(told | {"size": f"{size[1]}x{size[0]}"})
