"""What a worker tells of one longer work, as it goes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from modules.protocol import Failed, decode
from modules.supervisor import client
from modules.supervisor.child import Child

if TYPE_CHECKING:
    from http.client import HTTPResponse


class Told:
    """The messages of one command, to be read once, on one thread; :meth:`stop` ends the work, from any thread."""

    def __init__(self, child: Child, path: str, order: Any) -> None:
        self._child, self._path, self._order = child, path, order
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = False

    def messages(self) -> Iterator[Any]:
        """Each message until the last one; the work ends where the iterator is closed. None more comes after a stop.

        Raises what the worker refused or failed with, and WorkerCrashed, WorkerKilled or Cancelled (the model was
        unloaded) where it breaks off.
        """
        from http.client import HTTPException

        try:
            connection = self._child.connect(None)
            try:
                with self._lock:
                    self._socket = connection.sock
                    if self._stopped:
                        return
                self._child.send(connection, "POST", self._path, self._order)
                yield from _lines(client.accepted(connection.getresponse()))
            finally:
                with self._lock:
                    self._socket = None
                connection.close()
        except (OSError, HTTPException, ValueError) as error:
            if self._stopped:
                return
            raise self._child.broken(error) from error

    @property
    def running(self) -> bool:
        """Whether the worker is at it."""
        return self._socket is not None

    def stop(self) -> None:
        """Returns at once; may be called again."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads


def _lines(response: HTTPResponse) -> Iterator[Any]:
    with response:
        for line in response:
            message = decode(line)
            if isinstance(message, Failed):
                raise message.error
            yield message
