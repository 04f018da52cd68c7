"""What the supervisor and its loads share under one lock: the record, the workers, and who may change them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modules.errors import Busy, Cancelled, LoadstoneError, WorkerCrashed, WorkerTimeout
from modules.protocol import Event, Failed, LoadOrder, Progress
from modules.supervisor.child import Child, packages_changed_since
from modules.supervisor.state import LOAD_STATES, Loaded, Record, State

log = logging.getLogger(__name__)


OnLoad = Callable[[LoadOrder, float, LoadstoneError | None], None]  # what was loaded, in how many seconds, or why not


@dataclass(eq=False)
class Job:
    """The load, unload or change of LoRAs under way. One thing changes at a time; who wants another is refused, or
    waits."""

    what: str  # in words, for whoever is refused: "loading X"
    previous: Loaded | None = None  # ended for this load, and to be brought back if it fails
    beside: bool = False  # the old model answers until the new one is ready
    child: Child | None = None  # the worker that loads
    asked: Child | None = None  # the worker that changes its LoRAs: an unload ends it, and no cancel does
    cancelled: bool = False
    abandoned: bool = False  # cancelled, and nothing is to be brought back
    settled: threading.Event = field(default_factory=threading.Event)  # the order's outcome is written down
    over: threading.Event = field(default_factory=threading.Event)

    def next_attempt(self) -> None:
        """The outcome of one order is written down; the job may go on with another."""
        settled, self.settled = self.settled, threading.Event()
        self.cancelled, self.child = self.abandoned, None
        settled.set()


class Owner:
    """Its fields are read and written with :attr:`changed` held, whose waiters are woken by every change.

    Nobody waits for a process with the lock held: the threads that see it end need the lock to say so.
    """

    def __init__(self, command: Sequence[str], measure: Callable[[], Any], *, keep_warm: bool, on_load: OnLoad) -> None:
        self.changed = threading.Condition()
        self.record = Record()
        self.job: Job | None = None
        self.child: Child | None = None  # the worker whose model answers
        self.warm: Child | None = None
        self.spoken_of: Child | None = None  # the worker whose log is shown
        self.children: set[Child] = set()  # every worker that is not gone
        self.closed = False
        self._command = tuple(command)
        self._measure = measure
        self._keep_warm = keep_warm
        self.on_load = on_load

    # --- with the lock held ---

    def change(self, state: State | None = None) -> None:
        self.record.change(state or self.record.state)
        self.changed.notify_all()

    def take_job(self, job: Job) -> None:
        """Raises Busy while there is another, and Cancelled after the end."""
        if self.closed:
            raise Cancelled("Loadstone is shutting down.")
        if self.job is not None:
            raise Busy(f"{job.what[0].upper()}{job.what[1:]} has to wait: Loadstone is {self.job.what}.")
        self.job = job

    def end_job(self, job: Job) -> None:
        if self.job is job:
            self.job = None
        job.settled.set()
        job.over.set()
        self.changed.notify_all()

    def refuse_cancelled(self, job: Job) -> None:
        if job.cancelled or self.closed:
            raise Cancelled("The load was cancelled.")

    def spawn(self, *, imports: bool) -> Child:
        """A new worker, known before anybody can close. Raises WorkerCrashed where it cannot be started."""
        try:
            child = Child(self._command, self._on_event, self._on_exit, imports=imports)
        except OSError as error:
            raise WorkerCrashed(f"The model's process could not be started: {error}.") from error
        self.children.add(child)  # its end, however early, is told after this: that needs the lock
        return child

    def warm_up(self) -> None:
        """Start a warm worker, if one is wanted and none waits. Not during a load, which needs the processors."""
        if not self._keep_warm or self.closed or self.warm is not None or self.job is not None:
            return
        try:
            self.warm = self.spawn(imports=True)
        except WorkerCrashed as error:
            self.record.note(f"No worker waits warm: {error.message}")
        self.change()

    def take_warm(self) -> Child | None:
        """The worker that waits, if it can still be used; what it is used for is the caller's."""
        warm, self.warm = self.warm, None
        if warm is not None and packages_changed_since(warm.started):
            warm.ask_to_end()  # it would not see a package that has just been installed
            return None
        return warm

    def detach(self) -> Child | None:
        """The worker whose model answers no more from now on; the caller ends it, without the lock."""
        child, self.child = self.child, None
        self.record.loaded = None
        return child

    def note_warm_death(self, error: LoadstoneError) -> None:
        self.record.note(f"The worker that waited is gone, and the next load starts one. {error.message}")
        self.changed.notify_all()

    # --- without the lock ---

    def end(self, child: Child) -> None:
        """End a worker; one that cannot be ended is noted, where nobody is there to be told."""
        try:
            child.end()
        except WorkerTimeout as error:
            with self.changed:
                self.record.note(error.message)
                self.changed.notify_all()

    def measured(self) -> Any:
        try:
            return self._measure()
        except Exception:  # a figure for the page: no load fails for it
            log.exception("measuring the machine failed")
            return None

    # --- what workers tell, on their own threads ---

    def _on_event(self, child: Child, event: Event | None) -> None:
        with self.changed:
            if isinstance(event, Failed) and child is self.warm:
                self.warm = None  # its imports failed; what to mend can be mended before the next load
                self.note_warm_death(event.error)
                child.ask_to_end()
            elif isinstance(event, Progress) and self.job is not None and self.job.child is child:
                self.record.advance(event)
                self.changed.notify_all()
            elif event is not None or child is self.spoken_of:
                self.change()

    def _on_exit(self, child: Child) -> None:
        with self.changed:
            self.children.discard(child)
            if child is self.warm:
                self._warm_died(child)
            elif child is self.child:
                self._loaded_died(child)
            self.change()

    def _warm_died(self, child: Child) -> None:
        self.warm = None  # no new one before the next load has ended: it would die as well, again and again
        if not child.ended_on_purpose:
            self.note_warm_death(child.death())

    def _loaded_died(self, child: Child) -> None:
        error, loaded = child.death(), self.record.loaded
        self.detach()
        if self.record.state in LOAD_STATES:  # the record tells of the other one, loading beside it
            self.record.note(f"{loaded.order.name if loaded else 'The model'} ended meanwhile. {error.message}")
        else:
            self.spoken_of = child
            self.record.fail(loaded.order if loaded else None, error)
