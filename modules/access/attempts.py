"""Wrong passwords and keys slow down whoever tries them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from modules.errors import TooManyAttempts

FREE = 3  # typos cost nothing
LONGEST_S = 30.0
_LONGEST_FOR_ALL_S = 2.0  # somebody with many addresses must not keep everybody out
_FORGET_S = 600.0
_MOST_CLIENTS = 2048
_MOST_WAITING = 256  # requests, of all addresses together
_FROM_ALL = "*"  # many addresses together
_FREE_FROM_ALL = 50


@dataclass
class _Record:
    failures: int = 0
    last: float = 0.0


class Attempts:
    """Counts wrong attempts by address and together. After a few, each further one doubles the wait, up to half a
    minute; until it is over no secret from there that could be guessed is looked at, right or wrong. Who is logged in
    notices nothing, and who knows a secret that nobody could guess waits for nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._waiting: set[str] = set()
        self._lock = threading.Lock()

    def wait_s(self, client: str) -> float:
        """How long until that address may try again; 0 = now."""
        with self._lock:
            return max(self._wait(client, FREE, LONGEST_S), self._wait(_FROM_ALL, _FREE_FROM_ALL, _LONGEST_FOR_ALL_S))

    async def turn(self, client: str) -> None:
        """Return when that address may try again: one request of an address waits, so that its program is late and
        not refused. Raises TooManyAttempts for those that come meanwhile: they would be guesses in parallel.
        """
        wait_s = self.wait_s(client)
        if wait_s <= 0:
            return
        if client in self._waiting or len(self._waiting) >= _MOST_WAITING:
            raise TooManyAttempts(f"Too many wrong attempts. Try again in {math.ceil(wait_s)} s.")
        self._waiting.add(client)
        try:
            while (wait_s := self.wait_s(client)) > 0:
                await asyncio.sleep(wait_s)
        finally:
            self._waiting.discard(client)

    def _wait(self, client: str, free: int, longest_s: float) -> float:
        record = self._records.get(client)
        if record is None or record.failures < free:
            return 0.0
        pause = min(longest_s, float(2 ** min(record.failures - free, 10)))
        return max(0.0, record.last + pause - self._clock())

    def failed(self, client: str) -> None:
        """That address has tried something wrong."""
        with self._lock:
            now = self._clock()
            for name in (client, _FROM_ALL):
                record = self._records.pop(name, _Record())
                if now - record.last > _FORGET_S:
                    record.failures = 0
                record.failures, record.last = record.failures + 1, now
                self._records[name] = record
            while len(self._records) > _MOST_CLIENTS:
                self._records.popitem(last=False)

    def succeeded(self, client: str) -> None:
        """That address knows an administrator's secret: its typos are forgotten."""
        with self._lock:
            self._records.pop(client, None)
