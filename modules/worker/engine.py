"""The thread on which a model is loaded and used: jobs in the order in which they came, and answers between them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_NEVER = 2**63


class Turns(Protocol):
    """Work that goes on in small turns, several answers together."""

    def turn(self, before: Callable[[], int]) -> bool:
        """Do a little for what was numbered below ``before()``; False where nothing of that is left to do."""
        ...


@dataclass(frozen=True, eq=False)
class _Job:
    number: int
    future: Future[Any]
    work: Callable[[], Any]


class Engine:
    """Jobs for one thread, since each thread that computes would bring its own pool of computing threads.

    A job of :meth:`submit` has the thread to itself: it begins when what was numbered before it is done, and what was
    numbered after it begins when it is done. One of :meth:`slip_in` waits for no answer, and no answer for it. A job
    whose future is cancelled before its turn leaves the queue.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._short: deque[_Job] = deque()  # those that come between two turns
        self._numbers = 0
        self._news = False
        self._turns: Turns | None = None

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``function``; the future has its result, or what it raised."""
        return self._queue(self._jobs, lambda: function(*args, **kwargs))

    def slip_in(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As :meth:`submit`, for a short piece of work that leaves the model as it was: one comes between two turns.

        It waits for the jobs of :meth:`submit` that were numbered before it.
        """
        return self._queue(self._short, lambda: function(*args, **kwargs))

    def _queue(self, queue: deque[_Job], work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            queue.append(_Job(self.number(), future, work))
            self.wake()
        return future

    def number(self) -> int:
        """The next number in the order of all that is asked of this thread."""
        with self._changed:
            self._numbers += 1
            return self._numbers

    def take_turns(self, turns: Turns) -> None:
        """From now on ``turns`` are taken wherever no earlier job stands. Called on the engine's thread."""
        self._turns = turns

    def wake(self) -> None:
        """Look again for something to do: there is more for a turn."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def run(self) -> NoReturn:
        """Work off turns and jobs, for ever, on the calling thread."""
        while True:
            self._once()  # in a function, so that nothing holds on to a job that is done

    def _once(self) -> None:
        with self._changed:
            self._news = False
        busy = self._turns is not None and self._turns.turn(self._first_job)
        job = self._next(busy)
        if job is not None:
            _work(job)

    def _next(self, busy: bool) -> _Job | None:
        """What comes before the next turn, if anything. ``busy``: turns have something left to do."""
        with self._changed:
            while not (busy or self._jobs or self._short or self._news):
                self._changed.wait()
            if self._short and self._short[0].number < self._first_job():
                return self._short.popleft()
            alone = not busy and not self._news  # with news, an answer may have come that was numbered before the job
            return self._jobs.popleft() if alone and self._jobs else None

    def _first_job(self) -> int:
        """The number of the first job of :meth:`submit` that still stands in the queue."""
        with self._changed:
            while self._jobs and self._jobs[0].future.cancelled():
                self._jobs.popleft()
            return self._jobs[0].number if self._jobs else _NEVER


def _work(job: _Job) -> None:
    if not job.future.set_running_or_notify_cancel():
        return
    try:
        job.future.set_result(job.work())
    except BaseException as error:
        job.future.set_exception(error)
