"""A command's answer that tells how its work stands: lines of JSON, Progress … and one message that ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

from starlette.responses import StreamingResponse

from modules.protocol import Progress, encode

Tell: TypeAlias = Callable[[Any], None]  # called on any thread


def telling(begin: Callable[[Tell, threading.Event], None]) -> StreamingResponse:
    """What the work that ``begin`` begins tells, up to what is no Progress. Closing the connection sets the event."""
    return StreamingResponse(_lines(begin), media_type="application/x-ndjson")


async def _lines(begin: Callable[[Tell, threading.Event], None]) -> AsyncIterator[bytes]:
    loop, stopped = asyncio.get_running_loop(), threading.Event()
    told: asyncio.Queue[Any] = asyncio.Queue()

    def tell(message: Any) -> None:
        loop.call_soon_threadsafe(told.put_nowait, message)

    try:
        begin(tell, stopped)
        while isinstance(message := await told.get(), Progress):
            yield encode(message)
        yield encode(message)
    finally:
        stopped.set()
