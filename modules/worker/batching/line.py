"""Those who wait for an answer, and who of them comes next."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modules.protocol import Chunk, GenerateOrder, Waiting


@dataclass(eq=False)
class Ticket:
    """One answer that is asked for. ``number``: its place in the order of all that was asked of the worker."""

    number: int
    order: GenerateOrder
    emit: Callable[[Chunk], None]
    stopped: threading.Event
    place: int = 0  # the last that was told; 0: none

    @property
    def user(self) -> str:
        return self.order.user


class Line:
    """Tickets that wait. Users take turns; of one user's tickets the earliest comes first.

    A user who comes in begins where those are who have been served longest ago, and so waits behind one ticket of
    each other user at most. May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._served: Counter[str] = Counter()  # by user, since the line was empty
        self._round = 0  # how often the last one taken had been served before
        self._held = False

    def add(self, ticket: Ticket) -> None:
        with self._lock:
            if not self._waiting:
                self._served.clear()
                self._round = 0
            if all(other.user != ticket.user for other in self._waiting):
                self._served[ticket.user] = max(self._served[ticket.user], self._round)
            self._waiting.append(ticket)
            if self._held:
                self._tell()

    def first(self, before: int) -> Ticket | None:
        """Who is next, of those numbered below ``before``."""
        with self._lock:
            waiting = [ticket for ticket in self._waiting if ticket.number < before]
            return min(waiting, key=lambda one: (self._served[one.user], one.number), default=None)

    def take(self, ticket: Ticket) -> bool:
        """It is this one's turn; False where it has left meanwhile, which may be at any moment."""
        with self._lock:
            if ticket not in self._waiting:
                return False
            self._waiting.remove(ticket)
            self._round = self._served[ticket.user]
            self._served[ticket.user] += 1
            return True

    def leave(self, ticket: Ticket) -> None:
        """It waits no longer, if it did."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                if self._held:
                    self._tell()

    def gone(self) -> list[Ticket]:
        """Take out those who no longer want an answer."""
        with self._lock:
            gone = [ticket for ticket in self._waiting if ticket.stopped.is_set()]
            self._waiting = [ticket for ticket in self._waiting if ticket not in gone]
        return gone

    def tell(self) -> None:
        """Tell each its place, 1 for the next, where it is another than was told before."""
        with self._lock:
            self._tell()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody is taken meanwhile: whoever comes is told the place at once."""
        with self._lock:
            self._held = True
            self._tell()
        try:
            yield
        finally:
            with self._lock:
                self._held = False

    def _tell(self) -> None:
        for place, ticket in enumerate(self._in_order(), 1):
            if ticket.place != place:
                ticket.place = place
                ticket.emit(Waiting(place))

    def _in_order(self) -> list[Ticket]:
        served = Counter(self._served)
        places: list[tuple[int, int, Ticket]] = []
        for ticket in sorted(self._waiting, key=lambda one: one.number):
            places.append((served[ticket.user], ticket.number, ticket))
            served[ticket.user] += 1
        return [ticket for _, _, ticket in sorted(places, key=lambda one: one[:2])]
