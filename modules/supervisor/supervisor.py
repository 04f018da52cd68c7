"""The one owner of "what is loaded": it starts, hands orders to, cancels and ends workers.

Every decision is made under one lock, the owner's, and never on a snapshot. One thing changes at a time, a
load or an unload; a second load is refused, and an unload ends the load that runs.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from modules.errors import LoadstoneError, NothingLoaded
from modules.protocol import (
    COUNT,
    MEMORY,
    AdapterChoice,
    AdaptersReport,
    CountOrder,
    GenerateOrder,
    LoadOrder,
    Memory,
    decode,
)
from modules.supervisor import adapting
from modules.supervisor.answer import Answer
from modules.supervisor.child import Child
from modules.supervisor.loading import Load
from modules.supervisor.owner import Job, OnLoad, Owner
from modules.supervisor.state import LOAD_STATES, Snapshot, State
from modules.supervisor.told import Told

COMMAND = (sys.executable, "-m", "modules.worker")
_COUNT_S = 30.0
_MEMORY_S = 2.0
_RATE_S = 0.5  # between changes that only tell of more tokens


class Supervisor:
    """See the module. Every method may be called from any thread.

    ``measure`` tells what the machine has, before and after a load; it is called without the lock.
    ``start_timeout_s`` is how long a worker may take until it listens. ``on_load`` is told how each load ended, on the
    thread that loaded.
    """

    def __init__(
        self,
        *,
        warm_worker: bool = True,
        measure: Callable[[], Any] = lambda: None,
        command: Sequence[str] = COMMAND,
        start_timeout_s: float = 60.0,
        on_load: OnLoad = lambda *_: None,
    ) -> None:
        self._owner = Owner(command, measure, keep_warm=warm_worker, on_load=on_load)
        self._changed = self._owner.changed
        self._start_timeout_s = start_timeout_s
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()
        self._told: weakref.WeakSet[Told] = weakref.WeakSet()
        self._last_order: LoadOrder | None = None
        self._rate_told = 0.0
        atexit.register(self.close)

    # --- what others see ---

    def start(self) -> None:
        """Start the warm worker, if one is wanted."""
        with self._changed:
            self._owner.warm_up()

    def snapshot(self) -> Snapshot:
        """Everything as it stands now."""
        owner, record = self._owner, self._owner.record
        with self._changed:
            running = self._running_answers()
            rate = sum(answer.tokens_per_second for answer in running) or record.tokens_per_second
            return Snapshot(
                version=record.version, state=record.state, loaded=record.loaded, order=record.order,
                progress=record.progress, started=record.started, elapsed_s=record.elapsed_s, eta_s=record.eta_s,
                error=record.error, notes=record.notes, generating=len(running), tokens_per_second=rate,
                context_used=record.context_used, warm=owner.warm is not None and owner.warm.warm,
                log=owner.spoken_of.log.lines() if owner.spoken_of else (), last=self._last(), idled=record.idled,
            )  # fmt: skip

    def wait(self, version: int, timeout_s: float) -> Snapshot:
        """The snapshot as soon as it is newer than ``version``, or as it stands after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._owner.record.version > version or self._owner.closed, timeout_s)
            return self.snapshot()

    def wait_loaded(self, timeout_s: float | None = None) -> Snapshot:
        """The snapshot as soon as no load is under way, bringing an old model back included."""
        with self._changed:
            self._changed.wait_for(lambda: self._owner.record.state not in LOAD_STATES or self._owner.closed, timeout_s)
            return self.snapshot()

    # --- loading and unloading ---

    def load(self, order: LoadOrder, *, beside: bool = False) -> None:
        """Begin to load; returns at once. Raises Busy while a load or unload is under way.

        ``beside``: the old model answers until the new one is ready. Otherwise it ends first, and is loaded
        again if the new one fails or is cancelled.
        """
        with self._changed:
            self._begin(order, beside)

    def reload(self) -> None:
        """Load what is loaded, or was last, again. Raises NothingLoaded where nothing ever was, and Busy."""
        with self._changed:
            order = self._last()
            if order is None:
                raise NothingLoaded("There is nothing to load again.")
            self._begin(order, beside=False)

    def _last(self) -> LoadOrder | None:
        """With the lock held: what answers; else what was asked for or crashed last; else what was unloaded last."""
        record = self._owner.record
        return record.loaded.order if record.loaded else record.order or self._last_order

    def _begin(self, order: LoadOrder, beside: bool) -> None:
        owner, old = self._owner, self._owner.record.loaded
        job = Job(f"loading {order.name}", previous=None if beside else old, beside=beside)
        owner.take_job(job)
        self._last_order, owner.spoken_of = order, None
        owner.record.begin(order)
        self._changed.notify_all()
        load = Load(owner, job, order, self._start_timeout_s)
        threading.Thread(target=load.run, daemon=True, name="load").start()

    def cancel(self) -> None:
        """Stop the load under way, if there is one; returns when the worker that loaded is gone.

        An old model that ended for it is being brought back when this returns; cancel again to stop that too.
        """
        with self._changed:
            job = self._owner.job
        if job is not None and job.asked is None:
            self._stop(job, abandon=False)

    def _stop(self, job: Job, *, abandon: bool) -> None:
        with self._changed:
            job.cancelled = True
            job.abandoned = job.abandoned or abandon
            child, settled = job.child or job.asked, job.settled
            if job.asked is not None:
                self._owner.detach()
                self._owner.change(State.UNLOADING)
            self._changed.notify_all()
        if child is not None:
            self._owner.end(child)
        settled.wait()

    def unload(self, *, idle: bool = False) -> None:
        """End what is loaded and what is being loaded; returns when their processes are gone.

        ``idle``: because nobody used it; the snapshot tells so. Raises WorkerTimeout where one cannot be ended.
        """
        job, child = self._begin_unload(idle)
        try:
            if child is not None:
                child.end()
        finally:
            with self._changed:
                self._owner.record.clear()
                self._owner.end_job(job)

    def _begin_unload(self, idle: bool) -> tuple[Job, Child | None]:
        """Take the job, as soon as nobody else has it: a load that runs is ended."""
        while True:
            with self._changed:
                running = self._owner.job
                if running is None:
                    job = self._owner.job = Job("unloading")
                    loaded, self._last_order = self._owner.record.loaded, self._last()
                    self._owner.record.idled = loaded.order.name if idle and loaded else ""
                    child = self._owner.detach()
                    self._owner.change(State.UNLOADING)
                    return job, child
            self._stop(running, abandon=True)
            running.over.wait()

    def close(self) -> None:
        """End every worker. Nothing can be loaded afterwards; may be called again."""
        owner = self._owner
        with self._changed:
            owner.closed = True
            owner.detach()
            if owner.job is None:
                owner.record.clear()
            else:
                owner.job.cancelled = owner.job.abandoned = True
            children = tuple(owner.children)
            owner.change()
        for child in children:
            child.ask_to_end()
        for child in children:
            owner.end(child)
        atexit.unregister(self.close)

    # --- using the model ---

    def generate(self, order: GenerateOrder) -> Answer:
        """An answer as it comes; see :class:`Answer`. Raises NothingLoaded."""
        with self._changed:
            answer = Answer(self._answering(), order, self._on_answer)
            self._answers.add(answer)
            self._rate_told = 0.0
            self._owner.change()
            return answer

    def apply_adapters(self, adapters: tuple[AdapterChoice, ...], wait_s: float = 60.0) -> AdaptersReport:
        """Make this set of LoRAs, and no other, the active one; see :func:`adapting.apply`."""
        return adapting.apply(self._owner, adapters, wait_s, self._applied)

    def _applied(self, order: LoadOrder) -> None:
        self._last_order = order

    def count(self, order: CountOrder) -> int:
        """How many tokens the prompt or the messages are. Raises NothingLoaded and what the worker refuses with."""
        with self._changed:
            child = self._answering()
        return int(json.loads(child.call("POST", COUNT, order, timeout_s=_COUNT_S))["tokens"])

    def ask(self, path: str, order: Any) -> dict[str, Any]:
        """The worker's answer to one short command. Raises NothingLoaded and what the worker refuses with."""
        with self._changed:
            child = self._answering()
        return dict(json.loads(child.call("POST", path, order, timeout_s=_COUNT_S)))

    def tell(self, path: str, order: Any) -> Told:
        """What the worker tells of a longer work as it goes on; see :class:`Told`. Raises NothingLoaded."""
        with self._changed:
            told = Told(self._answering(), path, order)
            self._told.add(told)
            return told

    @property
    def waiting(self) -> int:
        """How many answers have no text yet: they wait in line, or their prompts are being read."""
        with self._changed:
            return sum(1 for answer in self._running_answers() if not answer.begun)

    @property
    def working(self) -> bool:
        """Whether the worker is at something longer than an answer."""
        with self._changed:
            return any(told.running for told in self._told)

    def memory(self) -> Memory | None:
        """What the loaded model's process holds; None where nothing is loaded, or it is too busy to answer."""
        try:
            with self._changed:
                child = self._answering()
            memory = decode(child.call("GET", MEMORY, timeout_s=_MEMORY_S))
        except (LoadstoneError, ValueError):
            return None
        return memory if isinstance(memory, Memory) else None

    def _answering(self) -> Child:
        if self._owner.child is None:
            order = self._owner.record.order if self._owner.record.state in LOAD_STATES else None
            raise NothingLoaded(f"{order.name} is still loading." if order else "No model is loaded.")
        return self._owner.child

    def _running_answers(self) -> list[Answer]:
        return [answer for answer in self._answers if not answer.over and answer.child is self._owner.child]

    def _on_answer(self, answer: Answer) -> None:
        """An answer has grown or ended. More tokens alone are told twice a second at most."""
        with self._changed:
            now, record = time.monotonic(), self._owner.record
            if not answer.over and now - self._rate_told < _RATE_S:
                return
            self._rate_told = now
            if answer.over and answer.child is self._owner.child:
                record.tokens_per_second = answer.tokens_per_second or record.tokens_per_second
                if answer.done is not None:
                    record.context_used = answer.done.prompt_tokens + answer.done.completion_tokens
            self._owner.change()
