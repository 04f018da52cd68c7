"""Routes for the loaded model's tokens, by text-generation-webui's names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from modules.api.openai.bodies import FIRST, Body
from modules.api.openai.running import Lane
from modules.api.threads import Threads
from modules.service import Service
from modules.service.asking import user_of

_MOST_AT_ONCE = 4  # further ones wait: a model's process takes one text at a time


class TextBody(Body):
    text: str


class TokensBody(Body):
    tokens: Annotated[list[int], FIRST]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    lane, threads = Lane(), Threads(_MOST_AT_ONCE, "tokens")

    async def answer(request: Request, work: Callable[[], dict[str, Any]]) -> JSONResponse:
        user = user_of(request.scope)
        with lane.place(user):
            return await asyncio.wrap_future(threads.submit(user, lambda: JSONResponse(work())))

    @routes.post("/v1/internal/encode")
    async def encode(body: TextBody, request: Request) -> JSONResponse:
        def work() -> dict[str, Any]:
            tokens = service.encode(body.text)
            return {"tokens": tokens, "length": len(tokens)}

        return await answer(request, work)

    @routes.post("/v1/internal/decode")
    async def decode(body: TokensBody, request: Request) -> JSONResponse:
        return await answer(request, lambda: {"text": service.decode(body.tokens)})

    @routes.post("/v1/internal/token-count")
    async def token_count(body: TextBody, request: Request) -> JSONResponse:
        return await answer(request, lambda: {"length": len(service.encode(body.text))})

    return routes
