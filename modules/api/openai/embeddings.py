"""``/v1/embeddings``: texts, or token ids, as vectors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from modules.api.openai.bodies import EmbeddingBody
from modules.api.openai.reaching import Target, disconnected, reached
from modules.api.openai.running import Lane
from modules.api.threads import Threads
from modules.embeddings import Input
from modules.errors import Cancelled, LoadstoneError, OptionError, UnsupportedParameter
from modules.service import Service
from modules.service.asking import user_of
from modules.service.embedding import Embedder, Vectors
from modules.service.traffic import seen_of

T = TypeVar("T")
_MOST_AT_ONCE = 16  # further ones wait: a model takes one batch at a time


def router(service: Service, lane: Lane) -> APIRouter:
    """The route."""
    routes = APIRouter()
    threads = Threads(_MOST_AT_ONCE, "embedding")

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
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
            with lane.place(user):
                whole = partial(_whole, work, body, body.model or target.use.name)
                written, seen.prompt_tokens = await _run(work, threads.submit(user, whole), request)
        service.traffic.read(seen.model, seen.prompt_tokens)
        return Response(written, media_type="application/json")

    return routes


async def _run(embedder: Embedder, asked: Future[T], request: Request) -> T:
    """What comes of it; stops when the client goes."""
    work = asyncio.wrap_future(asked)
    gone = asyncio.create_task(disconnected(request))
    tasks: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        embedder.stop()
        if not asked.cancel():  # it has begun: its thread is free again when it has ended
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


def _whole(embedder: Embedder, body: EmbeddingBody, name: str) -> tuple[bytes, int]:
    """(the response, how many tokens were read). Written vector by vector: as one call of the encoder, the numbers of
    a large request would keep every other thread waiting for seconds.
    """
    vectors = embedder.run()
    count = sum(vectors.tokens)
    rest = json.dumps({"model": name, "usage": {"prompt_tokens": count, "total_tokens": count}}, ensure_ascii=False)
    data = [
        b'{"object":"embedding","index":%d,"embedding":%s}' % (place, _encoded(vectors, place, body))
        for place in range(len(vectors.data))
    ]
    return b'{"object":"list","data":[%s],%s' % (b",".join(data), rest[1:].encode("utf-8", "replace")), count


def _encoded(vectors: Vectors, place: int, body: EmbeddingBody) -> bytes:
    if body.encoding_format == "base64":
        return b'"%s"' % base64.b64encode(vectors.data[place])
    return json.dumps(vectors.floats(place), separators=(",", ":")).replace("NaN", "null").encode()  # JSON has no NaN
