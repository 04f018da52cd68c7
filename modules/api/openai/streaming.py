"""Server-sent events, in the form of OpenAI's streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from modules.api.openai.problems import error_body
from modules.errors import LoadstoneError

Events = AsyncIterator[dict[str, Any]]


async def stream(events: Events) -> StreamingResponse:
    """A response of these events. What is refused before the first one is raised, and gets a status of its own."""
    first = await anext(events)
    return StreamingResponse(
        _lines(first, events),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _lines(first: dict[str, Any], events: Events) -> AsyncIterator[bytes]:
    """``data: {…}`` for each, then ``data: [DONE]``. A failure on the way is the last event, and no DONE follows."""
    yield _line(first)
    try:
        async for event in events:
            yield _line(event)
    except LoadstoneError as error:
        yield _line(error_body(error)[1])
        return
    yield b"data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
