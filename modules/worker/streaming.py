"""One answer on its way from the engine's thread to whoever asked for it: lines of JSON, as they come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from modules.protocol import Chunk, GenerateOrder, Piece, Waiting, encode

if TYPE_CHECKING:
    from modules.worker.app import Worker

FIRST_WAIT_S = 0.005  # that the engine waits at most for the first text of an answer to be handed on
HANDED_ON_S = 0.0015  # from its sending on: as long as the web process takes for it
FLUSH_SECONDS = 0.05  # text waits at most so long for more: a line for every token would cost a fast model speed


class Outbox:
    """Chunks on their way from the engine's thread to the event loop: pieces that meet on the way become one."""

    def __init__(self, alone: Callable[[], bool]) -> None:
        """``alone``: whether nobody else is answered, asked on the engine's thread."""
        self._alone = alone
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._chunks: list[Chunk] = []
        self._begun = threading.Event()  # the first text is on its way to the web process

    def put(self, chunk: Chunk) -> None:
        """Called on the engine's thread, which computes the second token when the first one has been handed on: both
        processes that carry it want one of the cores that computing takes. Where others are answered it waits for
        nobody."""
        with self._lock:
            self._chunks.append(chunk)
            if len(self._chunks) > 1 and isinstance(chunk, Piece | Waiting):
                return  # the loop knows already
        self._loop.call_soon_threadsafe(self._filled.set)
        if isinstance(chunk, Piece) and not self._begun.is_set() and self._alone():
            self._begun.wait(FIRST_WAIT_S)

    def sent(self) -> None:
        """What was taken has been sent."""
        if not self._begun.is_set():
            self._loop.call_later(HANDED_ON_S, self._begun.set)

    async def take(self) -> list[Chunk]:
        """What has come since the last time, at least one chunk."""
        chunks: list[Chunk] = []
        while not chunks:
            await self._filled.wait()
            self._filled.clear()
            with self._lock:
                chunks, self._chunks = self._chunks, []
        return _merged(chunks)


def _merged(chunks: list[Chunk]) -> list[Chunk]:
    """The same with pieces as one, and of places in the line the last, which is none once a piece is there."""
    pieces = [chunk for chunk in chunks if isinstance(chunk, Piece)]
    places: list[Chunk] = [chunk for chunk in chunks if isinstance(chunk, Waiting)]
    ends: list[Chunk] = [chunk for chunk in chunks if not isinstance(chunk, Piece | Waiting)]
    if not pieces:
        return ends or places[-1:]
    text, reasoning = "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces)
    logprobs = tuple(told for piece in pieces for told in piece.logprobs)
    return [Piece(text, pieces[-1].tokens, reasoning, logprobs), *ends]


class Answer:
    """A response that streams one answer as lines of JSON; closing the connection stops the generation."""

    def __init__(self, worker: Worker, order: GenerateOrder) -> None:
        self._worker = worker
        self._order = order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stopped = threading.Event()
        outbox = Outbox(self._worker.alone)
        ticket = self._worker.generate(self._order, outbox.put, stopped)
        tasks = {asyncio.create_task(self._stream(outbox, send)), asyncio.create_task(_disconnect(receive))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.set()
            self._worker.line.leave(ticket)
            for task in tasks:
                task.cancel()
        for task in done:
            task.result()

    async def _stream(self, outbox: Outbox, send: Send) -> None:
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        ended = False
        while not ended:
            chunks = await outbox.take()
            ended = not isinstance(chunks[-1], Piece | Waiting)
            body = b"".join(map(encode, chunks))
            await send({"type": "http.response.body", "body": body, "more_body": not ended})
            if isinstance(chunks[-1], Piece):
                outbox.sent()
                await asyncio.sleep(FLUSH_SECONDS)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
