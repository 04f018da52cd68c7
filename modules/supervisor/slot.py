"""The place of one model in a fleet: its supervisor, and what the fleet keeps of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from modules.supervisor.state import LOAD_STATES, Loaded, State
from modules.supervisor.supervisor import Supervisor

NEVER = math.inf  # as a time to keep a model without use


@dataclass(frozen=True)
class Place:
    """One model of the fleet at one moment, for people and programs. It may be stale when it is read."""

    name: str  # what is loaded, or is being loaded
    loaded: Loaded | None
    state: State
    front: bool  # what the page shows
    pinned: bool
    uses: int  # requests that hold it
    closing: bool  # takes no new ones: it ends when those are served
    idle_s: float  # since it was used last; 0 while it is used
    ends_in_s: float | None  # where nobody uses it; None: never
    tokens_per_second: float
    answers: int  # running and waiting
    waiting: int  # of these, those without text yet


@dataclass(eq=False)
class Slot:
    """Read and written with the fleet's lock held. ``closing``: it is about to end, and takes no new use."""

    supervisor: Supervisor
    pinned: bool = False
    uses: int = 0
    closing: bool = False
    keep_alive_s: float | None = None  # None: as long as the fleet says
    used: float = field(default_factory=time.monotonic)
    _known: Loaded | None = None

    def loaded(self) -> Loaded | None:
        """The model that answers here. One that is new begins freshly used, and unpinned unless it came again."""
        loaded = self.supervisor.snapshot().loaded
        if loaded is not None and (self._known is None or loaded.since != self._known.since):
            self.keep_alive_s = None
            if self._known is None or loaded.order.name != self._known.order.name:
                self.pinned = False
            self._known = loaded
            self.used = max(self.used, time.monotonic() - max(0.0, time.time() - loaded.since))
        return loaded

    def unload(self, *, idle: bool = False) -> None:
        """End it, its load and its pin; called without the lock. ``idle``: nobody used it. Raises WorkerTimeout."""
        self.supervisor.unload(idle=idle)
        self._known = None

    @property
    def name(self) -> str:
        """The model that answers here; "" for none."""
        loaded = self.loaded()
        return loaded.order.name if loaded else ""

    @property
    def used_now(self) -> bool:
        """Whether somebody uses it, or it works at something longer than an answer."""
        return self.uses > 0 or self.supervisor.working

    @property
    def busy(self) -> bool:
        """Whether a load or an unload is under way."""
        return self.supervisor.snapshot().state in (*LOAD_STATES, State.UNLOADING)

    def ends_at(self, idle_s: float) -> float:
        """When it ends if nobody uses it, as ``time.monotonic`` counts; never for one that is pinned or in use."""
        if self.used_now:
            self.used = time.monotonic()
        if self.loaded() is None or self.pinned or self.used_now or self.closing or self.busy:
            return NEVER
        return self.used + (idle_s if self.keep_alive_s is None else self.keep_alive_s)

    def place(self, idle_s: float, *, front: bool) -> Place:
        """What there is to see."""
        snapshot, now, ends = self.supervisor.snapshot(), time.monotonic(), self.ends_at(idle_s)
        shown = snapshot.loaded.order if snapshot.loaded else snapshot.order
        return Place(
            name=shown.name if shown else "", loaded=snapshot.loaded, state=snapshot.state, front=front,
            pinned=self.pinned, uses=self.uses, closing=self.closing, idle_s=0.0 if self.used_now else now - self.used,
            ends_in_s=None if ends == NEVER else max(0.0, ends - now),
            tokens_per_second=snapshot.tokens_per_second if snapshot.generating else 0.0, answers=snapshot.generating,
            waiting=self.supervisor.waiting,
        )  # fmt: skip
