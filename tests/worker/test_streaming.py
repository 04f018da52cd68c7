"""Chunks on their way out of the worker: whom the engine waits for."""

from __future__ import annotations

import asyncio
import time

import pytest

from modules.protocol import Chunk, Piece, Waiting
from modules.worker import streaming
from modules.worker.streaming import Outbox
from tests.loops import run

LONG_S = 0.3


@pytest.fixture(autouse=True)
def long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FIRST_WAIT_S", LONG_S)


def put(outbox: Outbox, chunk: Chunk) -> float:
    """Seconds that the engine's thread was kept."""
    begin = time.monotonic()
    outbox.put(chunk)
    return time.monotonic() - begin


def test_the_engine_waits_for_nobody_while_others_are_answered() -> None:
    async def main() -> float:
        return await asyncio.to_thread(put, Outbox(lambda: False), Piece("a", 1))

    assert run(main()) < LONG_S / 2


def test_the_engine_waits_until_the_first_text_has_been_handed_on_and_then_no_more() -> None:
    async def main() -> tuple[float, float, float]:
        outbox = Outbox(lambda: True)
        place = await asyncio.to_thread(put, outbox, Waiting(1))
        first = asyncio.create_task(asyncio.to_thread(put, outbox, Piece("a", 1)))
        while not any(isinstance(chunk, Piece) for chunk in await outbox.take()):
            pass
        await asyncio.sleep(0.05)
        assert not first.done(), "it went on before the text was sent"
        outbox.sent()
        return place, await first, await asyncio.to_thread(put, outbox, Piece("b", 2))

    place, first, second = run(main())
    assert place < LONG_S / 2
    assert 0.05 <= first < LONG_S
    assert second < LONG_S / 2


def test_the_engine_does_not_wait_for_ever() -> None:
    async def main() -> float:
        return await asyncio.to_thread(put, Outbox(lambda: True), Piece("a", 1))

    assert LONG_S <= run(main()) < 10 * LONG_S
