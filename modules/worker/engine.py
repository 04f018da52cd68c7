"""The thread on which a model is loaded and used: one job after another, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """Jobs for one thread, since a model takes one generation at a time, and each thread that computes would
    bring its own pool of computing threads. A job whose future is cancelled before its turn leaves the queue.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``function``; the future has its result, or what it raised."""
        future: Future[T] = Future()
        self._jobs.put((future, lambda: function(*args, **kwargs)))
        return future

    def run(self) -> NoReturn:
        """Work off the jobs, for ever, on the calling thread."""
        while True:
            _work(*self._jobs.get())  # in a function, so that nothing holds on to a job that is done


def _work(future: Future[Any], job: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
