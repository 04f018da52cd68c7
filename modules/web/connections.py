"""How many connections may be open, by address and together: whoever opens them without end keeps nobody else out.

They are counted where they are accepted, so that those count too that never get through TLS, and WebSockets. Without a
bound one address, with no login, takes all the files that the process may open.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.access.peers import is_loopback, peer

log = logging.getLogger(__name__)
_MOST_FILES = 65_536  # that are asked for: some systems set no limit
_MOST_TOGETHER = 4096
_FEW_FILES = 1024  # where the system does not tell its limit
_SAY_AGAIN_S = 60.0


@dataclass(frozen=True)
class Bounds:
    """How many connections may be open: together, of one address, and of one on this machine, a proxy's for one."""

    together: int
    each: int
    loopback: int


def bounds(files: int) -> Bounds:
    """Of a process that may hold so many files open: half of them stay for models, workers and downloads."""
    together = max(4, min(_MOST_TOGETHER, files // 2))
    return Bounds(together, together // 4, together * 3 // 4)


def open_files() -> int:
    """How many files this process may hold open, after its soft limit was raised towards the hard one."""
    if sys.platform == "win32":
        return _FEW_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_FILES
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS allows fewer than it says
            return soft
        return wanted
    return soft


class Connections:
    """Those that are open. Used on one thread alone, the event loop's."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._open: Counter[str] = Counter()  # by peer
        self._said = -_SAY_AGAIN_S

    def enter(self, address: str) -> Callable[[], None] | None:
        """What is to be called once when the connection is closed; None where there may be no further one."""
        one = peer(address)
        most = self._bounds.loopback if is_loopback(one) else self._bounds.each
        if self._open[one] >= most or self._open.total() >= self._bounds.together:
            self._say(address)
            return None
        self._open[one] += 1
        return lambda: self._leave(one)

    def _leave(self, one: str) -> None:
        self._open[one] -= 1
        if not self._open[one]:
            del self._open[one]

    def _say(self, address: str) -> None:
        if time.monotonic() - self._said >= _SAY_AGAIN_S:
            self._said = time.monotonic()
            log.warning("%d connections are open; further ones, of %s for one, are closed", self._open.total(), address)


class Listener(socket.socket):
    """A listening socket, taken over from another, whose further connections are closed at once.

    asyncio's selector loop calls :meth:`accept`; other loops would count nothing.
    """

    def __init__(self, listener: socket.socket, connections: Connections) -> None:
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises ConnectionAbortedError for one too many: the loop asks again in its next turn."""
        taken, address = super().accept()
        leave = self._connections.enter(str(address[0]) if isinstance(address, tuple) else "")
        if leave is None:
            taken.close()
            raise ConnectionAbortedError
        return _Connection(taken, leave), address


class _Connection(socket.socket):
    """One that counts until it is closed."""

    def __init__(self, taken: socket.socket, leave: Callable[[], None]) -> None:
        super().__init__(taken.family, taken.type, taken.proto, fileno=taken.detach())
        self._leave: Callable[[], None] | None = leave

    def close(self) -> None:
        super().close()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()
