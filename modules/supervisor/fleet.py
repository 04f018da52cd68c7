"""Several models at once: one supervisor each, which of them the page shows, and which end to make room.

A :class:`Supervisor` stays the owner of one model; the fleet owns which there are, in what order they were used, who
uses them now and which are pinned. Its lock comes before a supervisor's. Nothing that takes long happens with it held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec

from modules.errors import Busy, Cancelled, LoadstoneError, ModelNotFound, NothingLoaded, WorkerTimeout
from modules.protocol import LoadOrder, Memory
from modules.supervisor.slot import NEVER, Place, Slot
from modules.supervisor.state import LOAD_STATES, Loaded, Snapshot, State
from modules.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)
P = ParamSpec("P")
_LOOK_S = 1.0  # between looks at what has idled for too long
_ENDING_S = 3.0  # a person's load waits so long for what is just ending


class Use:
    """Somebody's hold on a model: while there is one, neither age nor need of room ends it. Release it once done."""

    def __init__(self, fleet: Fleet, slot: Slot, loaded: Loaded, keep_alive_s: float | None) -> None:
        self.supervisor = slot.supervisor
        self.loaded = loaded
        self._fleet, self._slot, self._keep_alive_s = fleet, slot, keep_alive_s
        self._held = True

    @property
    def name(self) -> str:
        return self.loaded.order.name

    def again(self) -> Use:
        """A second hold, to be released by itself."""
        with self._fleet.changed:
            self._slot.uses += 1
        return Use(self._fleet, self._slot, self.loaded, self._keep_alive_s)

    def release(self) -> None:
        """May be called again."""
        with self._fleet.changed:
            if self._held:
                self._held = False
                self._fleet.give_back(self._slot, self._keep_alive_s)

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _in_background(work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    threading.Thread(target=work, args=args, kwargs=kwargs, daemon=True, name="bring-back").start()


class Fleet:
    """See the module. ``first`` is there for good, and in front at the beginning; it may keep a worker warm.

    ``another`` makes a further supervisor; up to ``most`` models are loaded at a time. ``idle_s``: how long a model
    stays that nobody uses. Every method may be called from any thread.
    """

    def __init__(
        self, first: Supervisor, another: Callable[[], Supervisor] | None = None, *,
        most: int = 1, idle_s: float = NEVER,
    ) -> None:  # fmt: skip
        self.changed = threading.Condition()
        self.most = most if another else 1
        self.closed = False
        self.wanted_by_hand = 0  # persons whose load waits for what is just ending
        self._another = another
        self._idle_s = idle_s
        self._slots = [Slot(first)]
        self._front = self._slots[0]
        self._watching = False

    # --- what others see ---

    @property
    def front(self) -> Supervisor:
        """The model that the page shows, and that answers who names none."""
        return self._front.supervisor

    def places(self) -> tuple[Place, ...]:
        """Every model that is loaded or being loaded, the front one first."""
        with self.changed:
            slots = sorted(self._slots, key=lambda slot: slot is not self._front)
            places = [slot.place(self._idle_s, front=slot is self._front) for slot in slots]
            return tuple(place for place in places if place.loaded or place.state in LOAD_STATES)

    def loaded(self) -> tuple[Loaded, ...]:
        """Every model that answers, the front one first."""
        return tuple(place.loaded for place in self.places() if place.loaded)

    def held(self) -> tuple[LoadOrder, ...]:
        """The orders of all that is loaded or being loaded."""
        with self.changed:
            snapshots = [slot.supervisor.snapshot() for slot in self._slots]
        loaded = [one.loaded.order for one in snapshots if one.loaded]
        return (*loaded, *(one.order for one in snapshots if one.order and one.state in LOAD_STATES))

    def memory(self) -> list[tuple[str, Memory]]:
        """What the process of each loaded model holds; without those that are too busy to say."""
        with self.changed:
            asked = [(slot.name, slot.supervisor) for slot in self._slots if slot.name]
        return [(name, memory) for name, owner in asked if (memory := owner.memory()) is not None]

    def endable(self, *, by_hand: bool) -> tuple[Loaded, ...]:
        """What may end to make room, in the order in which it should: used least recently first.

        Pinned ones do not, except last where a person asks for the load.
        """
        with self.changed:
            slots = [slot for slot in self._by_use() if by_hand or not slot.pinned]
            loaded = [slot.loaded() for slot in sorted(slots, key=lambda slot: slot.pinned)]
            return tuple(one for one in loaded if one is not None)

    def full(self, name: str) -> bool:
        """Whether one has to end before ``name`` can be loaded, however much memory there is."""
        with self.changed:
            return sum(1 for slot in self._slots if slot.name != name and (slot.name or slot.busy)) >= self.most

    # --- using them ---

    def use(self, name: str = "", keep_alive_s: float | None = None) -> Use | None:
        """A hold on that model, or on the front one; None where it does not answer, or is about to end.

        ``keep_alive_s``: how long it stays after this use; :data:`NEVER`: until it is unloaded.
        """
        with self.changed:
            slot = self._find(name) if name else self._front
            loaded = slot.loaded() if slot and not slot.closing else None
            if slot is None or loaded is None:
                return None
            slot.uses += 1
            return Use(self, slot, loaded, keep_alive_s)

    def need(self, name: str = "", keep_alive_s: float | None = None) -> Use:
        """As :meth:`use`. Raises NothingLoaded, and Busy where another model is just taking its place."""
        with self.changed:
            use = self.use(name, keep_alive_s)
            if use is not None:
                return use
            slot, snapshot = self._find(name) or self._front, self.front.snapshot()
            if slot.closing and slot.name:
                raise Busy("Another model is being loaded in its place.", "Try again when it is there.")
            order = snapshot.order if snapshot.state in LOAD_STATES else None
            raise NothingLoaded(f"{order.name} is still loading." if order else "No model is loaded.")

    def give_back(self, slot: Slot, keep_alive_s: float | None) -> None:
        """Called by :meth:`Use.release`, with the lock held."""
        slot.uses -= 1
        slot.used = time.monotonic()
        slot.keep_alive_s = keep_alive_s  # the last use says it, also by saying nothing
        if keep_alive_s is not None:
            self.watch()
        self.changed.notify_all()

    # --- what a person does ---

    def load(self, order: LoadOrder, *, beside: bool = False, ends: Sequence[str] = ()) -> Supervisor:
        """Begin to load as a person asked, and show it; returns its owner when those in its way are gone.

        ``ends``: the models that have to end first. Raises Busy while a load is under way.
        """
        with self.changed:
            self._refuse_busy(order.name)
            slot, others = self.choose(order.name, ends, by_hand=True)
            for one in (slot, *others):
                one.closing = True
        try:
            ended = self.end(others)
            slot.supervisor.load(order, beside=beside)
            with self.changed:
                self._front = slot
            if ended:
                _in_background(self._undo, slot, order, ended)
            return slot.supervisor
        finally:
            self.open_again((slot, *others))

    def _refuse_busy(self, name: str) -> None:
        self.wanted_by_hand += 1
        self.changed.notify_all()
        try:
            self.changed.wait_for(lambda: self.closed or not any(slot.closing for slot in self._slots), _ENDING_S)
        finally:
            self.wanted_by_hand -= 1
        if self.closed:
            raise Cancelled("Loadstone is shutting down.")
        for slot in self._slots:
            if slot.closing or slot.busy:
                snapshot = slot.supervisor.snapshot()
                loading = snapshot.order if snapshot.state in LOAD_STATES else None
                what = f"loading {loading.name}" if loading else "ending a model"
                raise Busy(f"Loading {name} has to wait: Loadstone is {what}.")

    def cancel(self) -> None:
        """Stop the load under way, whose ever it is; what answered before answers on, or comes back."""
        with self.changed:
            loading = [slot.supervisor for slot in self._slots if slot.supervisor.snapshot().state in LOAD_STATES]
        for supervisor in loading:
            supervisor.cancel()

    def unload(self, name: str = "") -> None:
        """End that model, or the front one and its load. Raises ModelNotFound where it is not loaded."""
        with self.changed:
            slot = self._front if not name else self._find(name)
        if slot is None:
            raise ModelNotFound(f"The model {name!r} is not loaded.")
        slot.unload()
        self._tidy()

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a model loaded until a person ends it, or no longer. Raises ModelNotFound where it is not loaded."""
        with self.changed:
            self._named(name).pinned = pinned
            self.changed.notify_all()

    def to_front(self, name: str) -> None:
        """Let the page show that model. Raises ModelNotFound where it is not loaded."""
        with self.changed:
            self._front = self._named(name)
        self._tidy()

    def start(self) -> None:
        """Start the warm worker, if one is wanted, and the watch over idle models."""
        self.front.start()
        if self._idle_s != NEVER:
            self.watch()

    def close(self) -> None:
        """End every worker; may be called again."""
        with self.changed:
            self.closed = True
            slots = list(self._slots)
            self.changed.notify_all()
        threads = [threading.Thread(target=slot.supervisor.close, name="close") for slot in slots[1:]]
        for thread in threads:
            thread.start()
        slots[0].supervisor.close()
        for thread in threads:
            thread.join()

    # --- making room ---

    def choose(self, name: str, ends: Sequence[str], *, by_hand: bool) -> tuple[Slot, tuple[Slot, ...]]:
        """Where ``name`` is to be loaded, and which others have to end before. Called with the lock held.

        The last one of ``ends`` is replaced: its supervisor brings it back if the load fails.
        """
        ending = [slot for one in ends if (slot := self._find(one)) is not None and one != name]
        same = self._find(name)
        if same is not None:
            return same, tuple(ending)
        if ending:
            return ending[-1], tuple(ending[:-1])
        if not self.full(name):
            return self._empty(), ()
        order = [self._find(one.order.name) for one in self.endable(by_hand=by_hand)]
        return next((slot for slot in order if slot is not None), self._front), ()

    def _empty(self) -> Slot:
        """A place without a model: one with a warm worker first. The page, if it shows none either, follows."""
        for slot in (self._slots[0], self._front, *self._slots):
            if not slot.name and not slot.busy:
                self._front = self._front if self._front.name or self._front.busy else slot
                return slot
        if self._another is None:
            return self._front
        self._slots.append(Slot(self._another()))
        return self._slots[-1]

    def end(self, slots: Sequence[Slot]) -> tuple[LoadOrder, ...]:
        """Unload these; what they held, when they are gone. Raises WorkerTimeout."""
        ended = []
        for slot in slots:
            loaded = slot.loaded()
            slot.unload()
            ended += [loaded.order] if loaded else []
        return tuple(ended)

    def _undo(self, slot: Slot, order: LoadOrder, ended: Sequence[LoadOrder]) -> None:
        """Wait for a load; if it fails, bring back what ended for it beside the one that it replaced."""
        snapshot = slot.supervisor.wait_loaded()
        if snapshot.state in (State.FAILED, State.CANCELLED) and snapshot.order is order:
            self._bring_back(ended)

    def bring_back_soon(self, orders: Sequence[LoadOrder]) -> None:
        """Load what had to end again, one after another, while nothing else has taken its place. Returns at once."""
        if orders:
            _in_background(self._bring_back, orders)

    def _bring_back(self, orders: Sequence[LoadOrder]) -> None:
        for order in orders:
            with self.changed:
                busy = any(slot.busy or slot.closing for slot in self._slots)
                if self.closed or busy or self._find(order.name) or self.full(order.name):
                    log.warning("%s had to end, and has no place any more", order.name)
                    return
                slot = self._empty()
            try:
                slot.supervisor.load(order, beside=True)
                slot.supervisor.wait_loaded()
            except LoadstoneError as error:
                log.error("%s had to end, and does not come back: %s", order.name, error)

    def open_again(self, slots: Sequence[Slot]) -> None:
        """They may be used, where they still answer."""
        with self.changed:
            for slot in slots:
                slot.closing = False
            self.changed.notify_all()
        self._tidy()

    def loading(self) -> Snapshot | None:
        """The load that is under way."""
        with self.changed:
            snapshots = [slot.supervisor.snapshot() for slot in self._slots]
            return next((one for one in snapshots if one.state in LOAD_STATES), None)

    # --- the end of what nobody uses ---

    def watch(self) -> None:
        """Start the thread that ends idle models, where it does not run."""
        with self.changed:
            if not self._watching and not self.closed:
                self._watching = True
                threading.Thread(target=self._watch, daemon=True, name="idle-models").start()

    def _watch(self) -> None:
        while not self.closed:
            try:
                self._end_idle()
            except WorkerTimeout as error:
                log.error("%s", error)
            except Exception:  # else no idle model would end any more
                log.exception("looking for idle models failed")
                time.sleep(_LOOK_S)

    def _end_idle(self) -> None:
        """Unload the model that has idled too long, or wait a little for one. Raises WorkerTimeout."""
        with self.changed:
            if self.closed:
                return
            slot = min(self._slots, key=lambda slot: slot.ends_at(self._idle_s))
            left_s = slot.ends_at(self._idle_s) - time.monotonic()
            if left_s > 0:
                self.changed.wait(min(left_s, _LOOK_S))
                return
            slot.closing = True
            name = slot.name
        try:
            log.info("%s is unloaded: nobody uses it", name)
            slot.unload(idle=True)
        finally:
            self.open_again((slot,))

    # --- with the lock held ---

    def _find(self, name: str) -> Slot | None:
        return next((slot for slot in self._slots if slot.name == name and name), None)

    def _named(self, name: str) -> Slot:
        slot = self._find(name)
        if slot is None:
            raise ModelNotFound(f"The model {name!r} is not loaded.", "GET /v1/internal/model/loaded tells which are.")
        return slot

    def _by_use(self) -> list[Slot]:
        return sorted(self._slots, key=lambda slot: NEVER if slot.used_now else slot.used)

    def _tidy(self) -> None:
        """Drop places that are empty, and show another model, if there is one, where the one in front has ended by
        request or for want of use."""
        with self.changed:
            if not self._front.name and self.front.snapshot().state is State.EMPTY:
                answering = [slot for slot in self._by_use() if slot.name]
                loading = [slot for slot in self._slots if slot.supervisor.snapshot().state in LOAD_STATES]
                self._front = (answering or loading or [self._front])[-1]
            dropped = [slot for slot in self._slots[1:] if slot is not self._front and self._idle_place(slot)]
            self._slots = [slot for slot in self._slots if slot not in dropped]
        for slot in dropped:
            try:
                slot.supervisor.close()
            except LoadstoneError as error:
                log.error("%s", error)

    def _idle_place(self, slot: Slot) -> bool:
        return not (slot.name or slot.busy or slot.uses or slot.closing)
