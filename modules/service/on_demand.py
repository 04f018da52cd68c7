"""The model that a request names: one that is loaded, or one that is loaded because the request names it.

Requests wait as futures, not as threads. Users take turns, and of one user's requests the earliest comes first: whoever
needs the place of a model that others keep busy gets it once the answers under way are there, and those that come later
wait behind. A load that a person asks for goes before all of them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from modules.errors import (
    Busy,
    Cancelled,
    InternalError,
    LoadstoneError,
    NoPlace,
    Overloaded,
    error_from_dict,
)
from modules.protocol import LoadOrder
from modules.service.asking import share
from modules.supervisor import Fleet, State, Use
from modules.supervisor.slot import Slot

log = logging.getLogger(__name__)
MOST_WAITING = 256  # requests
_LOOK_S = 0.5  # between looks at what ends without telling: a person's load, waiters that gave up
_WORK_S = 3600.0


@dataclass(frozen=True)
class Prepared:
    """A load that the plan allows. ``beside``: everything that is loaded may stay; else ``ends`` have to end first."""

    order: LoadOrder
    beside: bool = False
    ends: tuple[str, ...] = ()


@dataclass(eq=False)
class _Ticket:
    name: str
    keep_alive_s: float | None
    user: str
    future: Future[Use] = field(default_factory=Future)


class OnDemand:
    """See the module. ``prepare``: the load of a model with its saved settings, as the plan allows it now; raises what
    it is refused for. The future of :meth:`ask` may be cancelled; its result has to be released.
    """

    def __init__(self, fleet: Fleet, prepare: Callable[[str], Prepared], most_waiting: int = MOST_WAITING) -> None:
        self._fleet = fleet
        self._prepare = prepare
        self._most_waiting = most_waiting
        self._tickets: list[_Ticket] = []
        self._served: Counter[str] = Counter()  # by user, since nobody waited
        self._round = 0  # how often the one whose turn it is has been served before
        self._running = False

    @property
    def waiting(self) -> int:
        """Requests that wait for a model."""
        with self._fleet.changed:
            return len(self._waiting())

    def _waiting(self) -> list[_Ticket]:
        return [ticket for ticket in self._tickets if not ticket.future.done()]

    def ask(self, name: str, keep_alive_s: float | None = None, user: str = "") -> Future[Use]:
        """A hold on the model of that name, at once or once it is loaded. Raises Overloaded.

        The future has what the load failed with, for each who waits.
        """
        with self._fleet.changed:
            ticket = _Ticket(name, keep_alive_s, user)
            use = self._fleet.use(name, keep_alive_s)
            if use is not None:
                ticket.future.set_result(use)
                return ticket.future
            self._refuse_many(user)
            if all(other.user != user for other in self._tickets):  # begins where those are who were served longest ago
                self._served[user] = max(self._served[user], self._round)
            self._tickets.append(ticket)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, daemon=True, name="on-demand").start()
            return ticket.future

    def _refuse_many(self, user: str) -> None:
        waiting = self._waiting()
        if len(waiting) >= self._most_waiting:
            raise Overloaded(f"{len(waiting)} requests wait for a model, and no more than that may.")
        mine = sum(ticket.user == user for ticket in waiting)
        if mine >= (most := share(self._most_waiting, len(waiting) - mine)):
            raise Overloaded(
                f"You wait for a model with {mine} requests, and no more than {most} may be yours: the other places "
                "are kept for other users.",
                "Wait for some of them to be answered.",
            )

    # --- the thread, which ends when nobody waits ---

    def _run(self) -> None:
        while name := self._next():
            try:
                self._serve(name)
            except LoadstoneError as error:
                self._fail(name, error)
            except Exception as error:
                log.exception("loading %s on demand failed", name)
                self._fail(name, InternalError(f"{name} could not be loaded: {type(error).__name__}: {error}."))

    def _next(self) -> str:
        """The model that is waited for longest by who was served least; "" where nobody waits any more."""
        with self._fleet.changed:
            self._tickets = self._waiting()
            if self._fleet.closed:
                for ticket in self._tickets:
                    _settle(ticket, Cancelled("Loadstone is shutting down."))
                self._tickets = []
            self._running = bool(self._tickets)
            if not self._tickets:
                self._served.clear()
                self._round = 0
                return ""
            first = min(self._tickets, key=lambda ticket: self._served[ticket.user])
            self._round = self._served[first.user]
            return first.name

    def _wanted(self, name: str) -> bool:
        return any(ticket.name == name and not ticket.future.done() for ticket in self._tickets)

    def _serve(self, name: str) -> None:
        """Give all who wait for ``name`` a hold on it; loads it where it is not there."""
        while not self._grant(name) and self._wanted(name) and not self._fleet.closed:
            if (other := self._fleet.loading()) is not None:  # a person's
                log.debug("%s waits for %s", name, other.order.name if other.order else "a load")
                with self._fleet.changed:
                    self._fleet.changed.wait(_LOOK_S)
                continue
            slots, opened = self._reserve(name, self._prepare(name).ends), False
            try:
                opened = bool(slots) and self._emptied(slots, name) and self._load(name, slots)
            finally:
                if not opened:  # else they may be somebody else's by now
                    self._fleet.open_again(slots)

    def _grant(self, name: str) -> bool:
        """Whether the model answers; then nobody waits for it any more."""
        with self._fleet.changed:
            mine = [ticket for ticket in self._tickets if ticket.name == name]
            for ticket in mine:
                use = self._fleet.use(name, ticket.keep_alive_s)
                if use is None:
                    return False
                if ticket.future.set_running_or_notify_cancel():
                    ticket.future.set_result(use)
                else:
                    use.release()
            self._leave(mine)
            return bool(mine)

    def _leave(self, served: list[_Ticket]) -> None:
        """They wait no longer: their users have had a turn."""
        self._tickets = [ticket for ticket in self._tickets if ticket not in served]
        self._served.update({ticket.user for ticket in served})

    def _reserve(self, name: str, ends: tuple[str, ...]) -> tuple[Slot, ...]:
        """The place for the model first, then those that end before; none takes a new use. Empty while one of them is
        somebody else's, or a person waits to load. Raises NoPlace where all are pinned.
        """
        fleet = self._fleet
        with fleet.changed:
            if fleet.full(name) and not fleet.endable(by_hand=False):
                raise NoPlace(f"{name} has no place: every model that is loaded is pinned ({fleet.most} at most).")
            place, others = fleet.choose(name, ends, by_hand=False)
            slots = (place, *others)
            if fleet.wanted_by_hand or any(slot.closing or slot.busy for slot in slots):
                fleet.changed.wait(_LOOK_S)
                return ()
            for slot in slots:
                slot.closing = True
            return slots

    def _emptied(self, slots: tuple[Slot, ...], name: str) -> bool:
        """Wait for the answers under way there. False where nobody waits for the model any more, or a person does, who
        need not wait for them."""
        fleet = self._fleet
        with fleet.changed:
            while any(slot.used_now for slot in slots):
                if not self._wanted(name) or fleet.wanted_by_hand or fleet.closed:
                    return False
                fleet.changed.wait(_LOOK_S)
        return True

    def _load(self, name: str, slots: tuple[Slot, ...]) -> bool:
        """Load it and hand it out; whether it was still possible. Raises what it fails with."""
        place, *others = slots
        load = self._prepare(name)  # again: what is free has changed while answers came to their end
        if not set(load.ends) <= {slot.name for slot in slots}:
            return False
        ended = self._fleet.end(others)
        place.supervisor.load(load.order, beside=load.beside)
        snapshot = place.supervisor.wait_loaded(_WORK_S)
        if snapshot.loaded is None or snapshot.loaded.order.name != name or snapshot.state is not State.READY:
            self._fleet.open_again(slots)
            self._fleet.bring_back_soon(ended)
            raise snapshot.error or Cancelled(f"{name} was not loaded: the load was ended.")
        with self._fleet.changed:
            self._fleet.open_again(slots)
            self._grant(name)
        return True

    def _fail(self, name: str, error: LoadstoneError) -> None:
        if isinstance(error, Busy):  # somebody else was first: look again
            with self._fleet.changed:
                self._fleet.changed.wait(_LOOK_S)
            return
        with self._fleet.changed:
            mine = [ticket for ticket in self._tickets if ticket.name == name]
            self._leave(mine)
        for ticket in mine:
            _settle(ticket, error_from_dict(error.to_dict()))  # one each: a traceback grows where it is raised


def _settle(ticket: _Ticket, error: LoadstoneError) -> None:
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
