"""An answer as it comes, with a stop that is obeyed at once, also while a long prompt is being read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from modules.protocol import Chunk, Done, Failed, GenerateOrder, Piece
from modules.supervisor import Answer, Supervisor


class Stop:
    """Ends the answers that go on under it, and those that begin later. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = threading.Event()
        self._answers: set[Answer] = set()

    def wait(self, timeout_s: float = 0.0) -> bool:
        """Whether it is set, by the end of that time."""
        return self._set.wait(timeout_s)

    def set(self) -> None:
        """Returns at once; may be called again."""
        with self._lock:
            self._set.set()
            answers = list(self._answers)
        for answer in answers:
            answer.stop()

    @contextmanager
    def ending(self, answer: Answer) -> Iterator[Answer]:
        """While the block reads ``answer``, it can be stopped; afterwards it is closed."""
        with self._lock:
            self._answers.add(answer)
            stopped = self._set.is_set()
        try:
            if stopped:
                answer.stop()
            with answer:
                yield answer
        finally:
            with self._lock:
                self._answers.discard(answer)


def chunks(supervisor: Supervisor, order: GenerateOrder, stop: Stop) -> Iterator[Chunk]:
    """Waiting …, Piece …, then Done, which says "cancelled" where ``stop`` was set. Closing it ends the answer.

    Raises NothingLoaded, what the worker failed with or refused, and WorkerCrashed where the answer breaks off.
    """
    tokens = 0
    with stop.ending(supervisor.generate(order)) as answer:
        for chunk in answer:
            if isinstance(chunk, Failed):
                raise chunk.error
            yield chunk
            if isinstance(chunk, Done):
                return
            tokens = chunk.tokens if isinstance(chunk, Piece) else tokens
    yield Done("cancelled", 0, tokens, 0.0, 0.0)
