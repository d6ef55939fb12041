"""The server's routes, behind its gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from fastapi import APIRouter, FastAPI
from fastapi import Request as Incoming
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from xllm_jax.serve import chat, drawing, realtime, transcriptions
from xllm_jax.serve.errors import INVALID, ApiError
from xllm_jax.serve.gate import Gate
from xllm_jax.serve.openai_schema import check_model
from xllm_jax.serve.security import Keys, Names
from xllm_jax.serve.service import Service

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def create(
    served: Service,
    keys: Keys | None = None,
    names: Names | None = None,
    log: TextIO | None = None,
    page: Callable[[FastAPI], object] | None = None,
) -> FastAPI:
    """The application of one model.

    Args:
      served: the model.
      keys: that open it; None asks for none.
      names: it may be called by; None for those of this machine alone.
      log: where a line of each request goes.
      page: adds the web page.
    """
    app = FastAPI(title="xllm_jax", docs_url=None, redoc_url=None, openapi_url=None)
    routers = [module.router(served) for module in (chat, drawing, realtime, transcriptions)]
    routers.append(_about(served))
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _told_of_http)
    if page:
        page(app)
    app.add_middleware(
        Gate,
        keys=keys or Keys(),
        names=names or Names(LOOPBACK),
        limits=served.limits,
        metrics=served.metrics,
        routes={str(getattr(route, "path", "")) for router in routers for route in router.routes},
        log=log,
    )
    return app


def _about(served: Service) -> APIRouter:
    routes = APIRouter()
    card = served.card
    told = {"id": card.name, "object": "model", "created": card.created, "owned_by": "xllm_jax"}
    told |= {"modalities": list(card.modalities), "draws": served.easel is not None}
    told["max_tokens"] = card.max_tokens

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [told]}

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, card.name)
        return told

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        state = "ready" if served.ready else "stopping" if served.draining else "starting"
        return JSONResponse({"status": state}, 200 if served.ready else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes


async def _told(_: Incoming, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _told_of_http(_: Incoming, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing here", 405: "There is no such method here"}
    what = words.get(error.status_code, "The request cannot be read")
    code = "not_found" if error.status_code == 404 else None
    found = ApiError(error.status_code, what, INVALID, code)
    return JSONResponse(found.body(), error.status_code, found.headers())
