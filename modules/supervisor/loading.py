"""One load, on a thread of its own: a worker, the order, the outcome, and the old model again if it failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from modules.errors import Cancelled, LoadFailed, LoadstoneError, WorkerCrashed, WorkerTimeout
from modules.protocol import LOAD, LoadOrder, Ready
from modules.supervisor.child import Child
from modules.supervisor.owner import Job, Owner
from modules.supervisor.state import Loaded, State

log = logging.getLogger(__name__)

_COMMAND_S = 30.0  # for the worker to take the order; loading itself has no limit


class Load:
    """``order`` for the ``job`` that the owner has taken. ``start_timeout_s``: until a worker listens."""

    def __init__(self, owner: Owner, job: Job, order: LoadOrder, start_timeout_s: float) -> None:
        self._owner = owner
        self._job = job
        self._order = order
        self._start_timeout_s = start_timeout_s

    def run(self) -> None:
        """Returns when the job is over, whatever came of it: the owner's record tells."""
        try:
            self._run()
        finally:
            with self._owner.changed:
                self._owner.end_job(self._job)
                self._owner.warm_up()

    def _run(self) -> None:
        failure = self._attempt(self._order, lambda: self._owner.record.finish(State.READY))
        if failure is None:
            return
        old = self._settle(failure)
        if old is None:
            return
        outcome = _outcome(failure)
        second = self._attempt(old, lambda: self._tell(f"{old.name} was brought back.", outcome))
        if second is not None:
            with self._owner.changed:
                self._tell(f"Nor could {old.name} be brought back. {second.message}", outcome)

    # --- one attempt ---

    def _attempt(self, order: LoadOrder, on_success: Callable[[], None]) -> LoadstoneError | None:
        """Load ``order``. None: it is loaded; ``on_success`` wrote it down. Otherwise its worker is gone."""
        begin = time.monotonic()
        error = self._tried(order, on_success)
        self._owner.on_load(order, time.monotonic() - begin, error)
        return error

    def _tried(self, order: LoadOrder, on_success: Callable[[], None]) -> LoadstoneError | None:
        try:
            self._end_old()
            self._load(order, on_success)
        except LoadstoneError as error:
            failure = error
        except Exception as error:
            log.exception("loading %s failed in the web process", order.name)
            failure = LoadFailed(f"{order.name} could not be loaded: {type(error).__name__}: {error}.")
        else:
            return None
        child = self._job.child
        if child is not None:
            self._owner.end(child)
            failure.details = failure.details or "\n".join(child.log.lines())
        return Cancelled(f"Loading {order.name} was cancelled.") if self._job.cancelled else failure

    def _end_old(self) -> None:
        """Raises WorkerTimeout where it cannot be ended: its memory is not free then."""
        if self._job.beside:
            return
        with self._owner.changed:
            child = self._owner.detach()
        if child is not None:
            child.end()

    def _load(self, order: LoadOrder, on_success: Callable[[], None]) -> None:
        before = self._owner.measured()
        child = self._give(order)
        self._await(child, lambda: child.outcome is not None, None)
        if not isinstance(child.outcome, Ready):
            raise child.death()
        self._commit(child, self._loaded(order, child.outcome, before), on_success)

    def _give(self, order: LoadOrder) -> Child:
        """The worker that has the order: the one that waits warm, or a new one."""
        owner = self._owner
        with owner.changed:
            owner.refuse_cancelled(self._job)
            self._job.child = owner.spoken_of = warm = owner.take_warm()
        if warm is not None:
            try:
                return self._give_to(warm, order)
            except WorkerCrashed as error:  # while it waited; what it died of has nothing to do with this load
                with owner.changed:
                    owner.refuse_cancelled(self._job)
                    owner.note_warm_death(error)
                owner.end(warm)
        with owner.changed:
            owner.refuse_cancelled(self._job)
            self._job.child = owner.spoken_of = child = owner.spawn(imports=False)
        return self._give_to(child, order)

    def _give_to(self, child: Child, order: LoadOrder) -> Child:
        if not self._await(child, lambda: child.port is not None, self._start_timeout_s):
            raise WorkerTimeout(
                f"The process for {order.name} did not come up within {self._start_timeout_s:g} s.",
                "The machine may be too busy, or a package may hang when it is imported; the log tells more.",
            )
        child.call("POST", LOAD, order, timeout_s=_COMMAND_S)
        with self._owner.changed:
            self._owner.refuse_cancelled(self._job)
            self._owner.change(State.LOADING)
        return child

    def _await(self, child: Child, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until ``done``; False after ``timeout_s``. Raises Cancelled, or why the worker died."""
        with self._owner.changed:
            self._owner.changed.wait_for(
                lambda: self._job.cancelled or self._owner.closed or child.gone.is_set() or done(), timeout_s
            )
            self._owner.refuse_cancelled(self._job)
            if not done() and child.gone.is_set():
                raise child.death()
            return done()

    def _loaded(self, order: LoadOrder, ready: Ready, before: Any) -> Loaded:
        after = self._owner.measured()
        return Loaded(order, ready.report, time.time(), ready.memory, before, after, ready.adapters)

    def _commit(self, child: Child, loaded: Loaded, on_success: Callable[[], None]) -> None:
        """From here on ``loaded`` answers, and the load can no longer be cancelled."""
        owner = self._owner
        with owner.changed:
            owner.refuse_cancelled(self._job)
            if child.gone.is_set():
                raise child.death()
            old = owner.detach()
            owner.child = child
            owner.record.answers(loaded)
            on_success()
            self._job.child = None
            self._job.settled.set()
            owner.changed.notify_all()
        if old is not None:
            owner.end(old)

    # --- after one that failed ---

    def _settle(self, failure: LoadstoneError) -> LoadOrder | None:
        """Write the failure down. Returns the order to load again, if an old model is to be brought back."""
        owner, job = self._owner, self._job
        with owner.changed:
            old = job.previous.order if job.previous else None
            if old == self._order or job.abandoned or owner.closed:
                old = None  # what has just failed is not tried again
            owner.record.error = failure
            if old is None:
                owner.record.finish(_outcome(failure))
            else:
                job.what = f"bringing {old.name} back"
                owner.record.restart(old)
            job.next_attempt()
            owner.changed.notify_all()
            return old

    def _tell(self, note: str, outcome: State) -> None:
        """Write down how bringing the old model back went: the record speaks of what was asked for again."""
        record = self._owner.record
        record.order = self._order
        record.note(f"{self._order.name} was not loaded. {note}")
        record.finish(outcome)
        self._owner.changed.notify_all()


def _outcome(failure: LoadstoneError) -> State:
    return State.CANCELLED if isinstance(failure, Cancelled) else State.FAILED
