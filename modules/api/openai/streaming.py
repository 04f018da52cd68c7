"""Server-sent events, in the form of OpenAI's streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modules.api.openai.problems import error_body
from modules.errors import LoadstoneError

Events = AsyncIterator[list[dict[str, Any]]]  # those that are there at the same time: one write for all of them


class EventStream(Response):
    """The events as they come. They end by themselves when the client goes: nothing else here watches for that, which
    costs Starlette's own StreamingResponse a task group before the first byte."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self._lines = lines
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream(events: Events) -> EventStream:
    """A response of these events. What is refused before the first ones is raised, and gets a status of its own."""
    first = await anext(events)
    return EventStream(_lines(first, events))


async def _lines(first: list[dict[str, Any]], events: Events) -> AsyncIterator[bytes]:
    """``data: {…}`` for each, then ``data: [DONE]``. A failure on the way is the last event, and no DONE follows."""
    yield b"".join(map(_line, first))
    try:
        async for together in events:
            yield b"".join(map(_line, together))
    except LoadstoneError as error:
        yield _line(error_body(error)[1])
        return
    yield b"data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
