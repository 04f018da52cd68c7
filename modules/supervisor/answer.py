"""One answer as it comes from a worker."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from modules.protocol import GENERATE, Chunk, Done, Failed, GenerateOrder, Piece, Waiting, decode
from modules.supervisor import client
from modules.supervisor.child import Child

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse


class Answer(Iterator[Chunk]):
    """Waiting …, Piece …, then one Done or Failed. Read it on one thread; :meth:`stop` or :meth:`close` it from any.

    Both end the generation, also while another thread waits for the first token, whose loop then ends.
    An answer that is dropped is closed. Raises what the worker refused with, and WorkerCrashed, WorkerKilled
    or Cancelled (the model was unloaded) where it breaks off. The command is sent at the first ``next()``.
    """

    def __init__(self, child: Child, order: GenerateOrder, on_change: Callable[[Answer], None]) -> None:
        self.child = child
        self.over = False
        self.done: Done | None = None
        self._order = order
        self._on_change = on_change
        self._reading = threading.Lock()
        self._closed = False
        self._handing = threading.Lock()  # a stop must not end a connection that is given back
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._socket: socket.socket | None = None  # http.client forgets it once the response has begun
        self._first: tuple[float, int] | None = None  # when the first piece came, and its count of tokens
        self._last: tuple[float, int] = (0.0, 0)

    @property
    def tokens_per_second(self) -> float:
        """After the first piece: reading the prompt is another matter. 0 = not known."""
        if self.done is not None and self.done.seconds > 0 and self.done.completion_tokens > 1:
            return (self.done.completion_tokens - 1) / self.done.seconds
        if self._first is None or self._last[0] <= self._first[0]:
            return 0.0
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    @property
    def begun(self) -> bool:
        """Whether there is text: before, it waits in line, or its prompt is being read."""
        return self._first is not None

    def __next__(self) -> Chunk:
        from http.client import HTTPException

        with self._reading:
            if self.over or self._closed:
                self._finish()
                raise StopIteration
            try:
                chunk = self._read()
            except (OSError, HTTPException, ValueError) as error:
                self._finish()
                if self._closed:
                    raise StopIteration from None
                raise self.child.broken(error) from error
            except BaseException:
                self._finish()
                raise
            self._note(chunk)
        return chunk

    def _read(self) -> Chunk:
        if self._response is None:
            self._connection = connection = self.child.connect(None)
            self._socket = connection.sock
            if self._closed:
                raise ConnectionAbortedError("closed before it began")
            self.child.send(connection, "POST", GENERATE, self._order)
            self._response = client.accepted(connection.getresponse())
        line = self._response.readline()
        if not line:
            raise ConnectionResetError("the answer has no end")
        chunk = decode(line)
        if not isinstance(chunk, Waiting | Piece | Done | Failed):
            raise json.JSONDecodeError("no part of an answer", line.decode("utf-8", "replace"), 0)
        return chunk

    def _note(self, chunk: Chunk) -> None:
        if isinstance(chunk, Piece):
            self._last = (time.monotonic(), chunk.tokens)
            self._first = self._first or self._last
            self._on_change(self)
        elif not isinstance(chunk, Waiting):
            self.done = chunk if isinstance(chunk, Done) else None
            self._finish()

    def _finish(self) -> None:
        """Give the connection back. Called by the thread that holds ``_reading``."""
        if self.done is not None:
            self._hand_back()
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()
        if not self.over:
            self.over = True
            self._on_change(self)

    def _hand_back(self) -> None:
        """Leave the connection to another command: this answer has come to its end."""
        from http.client import HTTPException

        with self._handing:
            self._socket = None
        response, connection, self._response, self._connection = self._response, self._connection, None, None
        if response is None or connection is None:
            return
        try:
            whole = not self._closed and not response.read()
        except (OSError, HTTPException):
            whole = False
        if whole:
            self.child.keep(connection)
        else:
            connection.close()

    def stop(self) -> None:
        """End the generation, and the loop of whoever reads. Waits for nobody; may be called again."""
        self._closed = True
        with self._handing, suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads

    def close(self) -> None:
        """End the generation and give the connection back. May be called again."""
        self.stop()
        with self._reading:
            self._finish()

    def __del__(self) -> None:
        # Without a lock: the garbage collector may call this on a thread that holds any. The supervisor
        # holds answers weakly, and so forgets this one.
        for resource in (self._response, self._connection):
            if resource is not None:
                resource.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
