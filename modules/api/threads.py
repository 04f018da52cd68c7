"""Threads for requests that may take long, shared fairly."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Asked:
    user: str
    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Threads:
    """Threads of their own for what may take long, since the common ones answer pages; a user has half at most.

    Of those who wait, who has the fewest comes next. May be used from any thread.
    """

    def __init__(self, most: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(most, name)
        self._most = most
        self._inside: Counter[str] = Counter()  # by user
        self._waiting: list[_Asked] = []
        self._lock = threading.Lock()

    def submit(self, user: str, work: Callable[[], T]) -> Future[T]:
        """The future has what ``work`` returns or raises; cancelled before its turn, it never begins."""
        asked = _Asked(user, work)
        with self._lock:
            self._waiting.append(asked)
        self._begin()
        return asked.future

    def _begin(self) -> None:
        """Let the next one begin, where there is a thread for it."""
        with self._lock:
            share = max(1, self._most // 2)
            may = [one for one in self._waiting if self._inside[one.user] < share]
            if not may or self._inside.total() == self._most:
                return
            asked = min(may, key=lambda one: self._inside[one.user])
            self._waiting.remove(asked)
            self._inside[asked.user] += 1
        self._pool.submit(self._run, asked)

    def _run(self, asked: _Asked) -> None:
        try:
            if asked.future.set_running_or_notify_cancel():
                asked.future.set_result(asked.work())
        except BaseException as error:
            asked.future.set_exception(error)
        finally:
            with self._lock:
                self._inside -= Counter([asked.user])  # forgets those who have none left
            self._begin()
