"""What is loaded, and what is being loaded: the snapshots that others see, and the record they are taken from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from modules.errors import LoadstoneError
from modules.protocol import AdaptersReport, LoadOrder, LoadReport, Memory, Progress


class State(str, Enum):
    """How the last load or unload stands. What answers is :attr:`Snapshot.loaded`, whatever the state says."""

    EMPTY = "empty"
    STARTING = "starting"  # the old model ends, the worker starts
    LOADING = "loading"  # the worker has the order
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


LOAD_STATES = frozenset({State.STARTING, State.LOADING})


@dataclass(frozen=True)
class Loaded:
    """A model that answers. ``machine_before`` and ``machine_after`` are what ``measure`` gave around the load.

    ``order.adapters`` is the set of LoRAs that is active now, so that loading the order again brings it back.
    """

    order: LoadOrder
    report: LoadReport
    since: float  # seconds since the epoch
    memory_at_load: Memory
    machine_before: Any
    machine_after: Any
    adapters: AdaptersReport | None = None  # of the last time that a set was applied; None: none ever was


@dataclass(frozen=True)
class Snapshot:
    """The truth at one moment. It may be stale when it is read: decide nothing on it, ask the supervisor.

    After a load failed, ``state`` is FAILED and ``error`` says why, while ``loaded`` is the model that
    still answers, or answers again. While that one is brought back, ``state`` is STARTING or LOADING, and
    ``error`` is there already.
    """

    version: int  # grows with every change
    state: State
    loaded: Loaded | None  # what answers now, also while another loads beside it
    order: LoadOrder | None  # what is being loaded, or was asked for last
    progress: Progress | None
    started: float  # of the last load, in seconds since the epoch; 0 = there was none
    elapsed_s: float  # of the load that runs, or how long the last one took
    eta_s: float | None  # to the end of the stage, by the stage's own rate; None = not known
    error: LoadstoneError | None
    notes: tuple[str, ...]
    log: tuple[str, ...]  # the tail of the worker's stderr
    warm: bool  # whether a worker waits that has imported the ML packages
    generating: int  # answers running or waiting
    tokens_per_second: float  # of the answers that run, together, or of the last one
    context_used: int  # in tokens, by the last answer's prompt and text
    last: LoadOrder | None  # what is loaded, or was last: what Reload loads
    idled: str  # the model that ended because nobody used it, until another load or unload; "": none did


@dataclass
class Record:
    """What the supervisor writes down under its lock. Every method is one change and raises ``version``."""

    version: int = 1
    state: State = State.EMPTY
    loaded: Loaded | None = None
    order: LoadOrder | None = None
    progress: Progress | None = None
    started: float = 0.0
    error: LoadstoneError | None = None
    notes: tuple[str, ...] = ()
    tokens_per_second: float = 0.0
    context_used: int = 0
    idled: str = ""
    _clock: float = 0.0  # when the load started; monotonic, since a wall clock may jump
    _elapsed_s: float = 0.0
    _stage: tuple[float, int] = field(default=(0.0, 0))  # when the stage began, and how much was done then

    def change(self, state: State) -> None:
        self.version += 1
        self.state = state

    def note(self, text: str) -> None:
        self.version += 1
        self.notes = (*self.notes, text)

    def begin(self, order: LoadOrder) -> None:
        """A load that somebody asked for: what the last one left behind is gone."""
        self.error, self.notes, self.idled = None, (), ""
        self.started, self._clock = time.time(), time.monotonic()
        self.restart(order)

    def restart(self, order: LoadOrder) -> None:
        """A load that goes on with another order: the old model is brought back."""
        self.order, self.progress = order, None
        self.change(State.STARTING)

    def advance(self, progress: Progress) -> None:
        self.version += 1
        new_stage = self.progress is None or progress.stage != self.progress.stage
        if new_stage or progress.done < self._stage[1]:
            self._stage = (time.monotonic(), progress.done)
        self.progress = progress
        if self.state is State.STARTING:
            self.state = State.LOADING  # its first words may overtake its answer to the order

    def finish(self, state: State) -> None:
        """The end of a load."""
        self._elapsed_s = time.monotonic() - self._clock
        self.progress = None
        self.change(state)

    def fail(self, order: LoadOrder | None, error: LoadstoneError) -> None:
        """The model that answered is gone."""
        self.order, self.error = order, error
        self.change(State.FAILED)

    def answers(self, loaded: Loaded) -> None:
        self.version += 1
        self.loaded = loaded
        self.tokens_per_second, self.context_used = 0.0, 0

    def adapted(self, report: AdaptersReport) -> None:
        """The model that answers has another set of LoRAs."""
        if self.loaded is None:
            raise AssertionError("LoRAs were applied, but nothing is loaded")
        old, order = self.loaded, replace(self.loaded.order, adapters=report.adapters)
        self.version += 1
        self.loaded = replace(old, order=order, adapters=report)
        if self.order == old.order:
            self.order = order

    def clear(self) -> None:
        """Nothing is loaded, and nothing went wrong."""
        self.loaded, self.order, self.progress, self.error, self.notes = None, None, None, None, ()
        self.tokens_per_second, self.context_used = 0.0, 0
        self.change(State.EMPTY)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._clock if self.state in LOAD_STATES else self._elapsed_s

    @property
    def eta_s(self) -> float | None:
        if self.progress is None or not self.progress.total:
            return None
        began, done_then = self._stage
        done = self.progress.done - done_then
        if done <= 0:
            return None
        return max(0.0, (self.progress.total - self.progress.done) * (time.monotonic() - began) / done)
