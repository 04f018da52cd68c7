"""``/v1/embeddings``: texts, or token ids, as vectors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request

from modules.api.openai.bodies import EmbeddingBody
from modules.api.openai.reaching import Target, disconnected, reached
from modules.api.openai.running import Lane
from modules.embeddings import Input
from modules.errors import Cancelled, LoadstoneError, OptionError, UnsupportedParameter
from modules.service import Service
from modules.service.asking import user_of
from modules.service.embedding import Embedder, Vectors
from modules.service.traffic import seen_of

_MOST_AT_ONCE = 16  # further ones wait: a model takes one batch at a time


def router(service: Service, lane: Lane) -> APIRouter:
    """The route."""
    routes = APIRouter()
    threads = ThreadPoolExecutor(_MOST_AT_ONCE, "embedding")  # of its own: the common ones answer pages

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> dict[str, Any]:
        """The mean over the last layer's hidden states, of length 1: what a model that writes text has to offer.

        A model that was trained for embeddings tells far better what two texts have in common.
        """
        if body.dimensions is not None:
            raise UnsupportedParameter("dimensions: vectors have the model's own size.")
        inputs = _inputs(body)
        seen, user = seen_of(request.scope), user_of(request.scope)

        def embedder(target: Target) -> Embedder:
            return Embedder(target.use, inputs, target.adapters)

        async with reached(service, body.model, body.keep_alive, request, embedder) as (target, work):
            seen.model = target.use.name
            lane.enter(user, 1)
            try:
                vectors = await _run(work, threads, request)
            finally:
                lane.leave(user)
        seen.prompt_tokens = sum(vectors.tokens)
        service.traffic.read(seen.model, seen.prompt_tokens)
        return _whole(vectors, body, body.model or target.use.name)

    return routes


async def _run(embedder: Embedder, threads: Executor, request: Request) -> Vectors:
    """The vectors; stops when the client goes."""
    work = asyncio.get_running_loop().run_in_executor(threads, embedder.run)
    gone = asyncio.create_task(disconnected(request))
    tasks: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        embedder.stop()
        with contextlib.suppress(LoadstoneError):
            await work
        raise Cancelled("The client has gone.")
    finally:
        gone.cancel()


def _inputs(body: EmbeddingBody) -> list[Input]:
    """What is to be embedded, each by itself. Raises OptionError for nothing."""
    given = body.input
    if isinstance(given, str):
        return [_text(given)]
    if not given or [] in given:
        raise OptionError("input: an empty list is none.")
    if isinstance(given[0], int):
        return [Input(ids=tuple(token for token in given if isinstance(token, int)))]
    return [_text(one) if isinstance(one, str) else Input(ids=tuple(one)) for one in given if not isinstance(one, int)]


def _text(text: str) -> Input:
    if not text:
        raise OptionError("input: an empty text is none.")
    return Input(text)


def _whole(vectors: Vectors, body: EmbeddingBody, name: str) -> dict[str, Any]:
    count = sum(vectors.tokens)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": place, "embedding": _encoded(vectors, place, body)}
            for place in range(len(vectors.data))
        ],
        "model": name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _encoded(vectors: Vectors, place: int, body: EmbeddingBody) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vectors.data[place]).decode()
    return vectors.floats(place)
