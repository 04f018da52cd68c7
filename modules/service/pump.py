"""An answer as it comes, with a stop that is obeyed while a long prompt is being read."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

from modules.errors import LoadstoneError
from modules.protocol import Chunk, Done, Failed, GenerateOrder, Piece
from modules.supervisor import Supervisor

log = logging.getLogger(__name__)


class Pump:
    """Moves chunks from the supervisor to the caller, so that a stop is answered while a long prompt is read."""

    def __init__(self, supervisor: Supervisor, order: GenerateOrder, stopped: threading.Event) -> None:
        self._chunks: queue.SimpleQueue[Chunk | LoadstoneError | None] = queue.SimpleQueue()
        self._stopped = stopped
        self._thread = threading.Thread(target=self._run, args=(supervisor, order), daemon=True, name="generate")

    def _run(self, supervisor: Supervisor, order: GenerateOrder) -> None:
        try:
            source = supervisor.generate(order)
            for chunk in source:
                self._chunks.put(chunk)
                if self._stopped.is_set():
                    break
        except LoadstoneError as error:
            self._chunks.put(error)
        except Exception as error:
            log.exception("a generation failed")
            self._chunks.put(LoadstoneError(f"{type(error).__name__}: {error}"))
        finally:
            self._chunks.put(None)

    def chunks(self) -> Iterator[Chunk]:
        self._thread.start()
        tokens = 0
        try:
            while True:
                try:
                    chunk = self._chunks.get(timeout=0.05)
                except queue.Empty:
                    if not self._stopped.is_set():
                        continue
                    yield Done("cancelled", 0, tokens, 0.0, 0.0)
                    return
                if chunk is None:
                    if self._stopped.is_set():
                        yield Done("cancelled", 0, tokens, 0.0, 0.0)
                    return
                if isinstance(chunk, LoadstoneError):
                    raise chunk
                if isinstance(chunk, Failed):
                    raise chunk.error
                tokens = chunk.tokens if isinstance(chunk, Piece) else tokens
                yield chunk
                if isinstance(chunk, Done):
                    return
        finally:
            self._stopped.set()
