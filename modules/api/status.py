"""``/v1/internal/model/status``: how things stand, as JSON once, or as server-sent events at every change."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from zlib import crc32

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from modules.errors import Overloaded
from modules.service import Service
from modules.service.asking import user_of
from modules.supervisor import Snapshot

MOST_STREAMS = 64
MOST_OF_ONE = MOST_STREAMS // 4  # user's
_LOOK_S = 0.1  # between looks for a change
_ALIVE_S = 15.0  # a comment so often, for proxies that close what is silent
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()
    streams: Counter[str] = Counter()  # those that are open, by user

    @routes.get("/v1/internal/model/status")
    async def status(request: Request) -> Response:
        """A page asks again and again; a program that accepts text/event-stream is told."""
        if "text/event-stream" not in request.headers.get("accept", ""):
            return JSONResponse(current(service))
        user = user_of(request.scope)
        if streams.total() >= MOST_STREAMS:
            raise Overloaded(f"{MOST_STREAMS} streams of the status are open, and no more than that may be.")
        if streams[user] >= MOST_OF_ONE:
            raise Overloaded(f"{MOST_OF_ONE} streams of the status are yours, and no more than that may be.")
        streams[user] += 1

        async def events() -> AsyncIterator[bytes]:
            try:
                async for event in changes(service):
                    yield event
            finally:
                streams[user] -= 1
                if not streams[user]:
                    del streams[user]

        return StreamingResponse(events(), media_type="text/event-stream", headers=_HEADERS)

    return routes


async def changes(service: Service) -> AsyncIterator[bytes]:
    """An event now and at every change, until the server ends."""
    told, last = None, 0.0
    while not service.fleet.closed:
        now = current(service)
        if now != told:
            told, last = now, time.monotonic()
            yield b"data: " + json.dumps(now, separators=(",", ":")).encode() + b"\n\n"
        elif time.monotonic() - last > _ALIVE_S:
            last = time.monotonic()
            yield b": alive\n\n"
        await asyncio.sleep(_LOOK_S)


def current(service: Service) -> dict[str, Any]:
    """What the page asks for twice a second, of the model in front, and which models are loaded."""
    state = brief(service.snapshot(), service.loras.merger.state().version)
    loaded = [one.order.name for one in service.fleet.loaded()]
    downloads, training = service.downloads.queue.shown(), training_shown(service)
    return {
        **state,
        "waiting": service.supervisor.waiting,
        "loaded": loaded,
        "downloads": downloads,
        "training": training,
    }


def brief(snapshot: Snapshot, merge_version: int = 0) -> dict[str, Any]:
    """What the page asks for twice a second. ``shown`` changes with all that it shows but the speed of answers."""
    since = snapshot.loaded.since if snapshot.loaded else 0
    name = snapshot.order.name if snapshot.order else ""
    adapters = snapshot.loaded.order.adapters if snapshot.loaded else ()
    shown = (
        snapshot.state,
        since,
        name,
        snapshot.progress,
        snapshot.notes,
        str(snapshot.error),
        adapters,
        merge_version,
    )
    return {
        "state": snapshot.state.value,
        "shown": crc32(repr(shown).encode()),
        "warm": snapshot.warm,
        "generating": snapshot.generating,
        "tokens_per_second": round(snapshot.tokens_per_second, 1),
    }


def training_shown(service: Service) -> str:
    """Changes with all that the Training tab shows."""
    loaded = service.snapshot().loaded
    versions = [service.training.state().version, service.perplexity.state().version]
    return " ".join(map(str, [*versions, loaded.since if loaded else 0]))
