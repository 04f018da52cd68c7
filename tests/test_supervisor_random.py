"""Any sequence of loads, cancels, unloads and crashes: never two models at rest, never a process too many."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modules.errors import AdapterMismatch, Busy, NothingLoaded, WorkerCrashed
from modules.protocol import AdapterChoice
from modules.supervisor import State
from tests.supervised import Supervised, order, prompt, supervised, text_of, until

NAMES = st.sampled_from(
    ["good", "other", "steps=10", "hang", "fail", "exit=3", "signal=SIGSEGV", "ignore-term", "refuse"]
)


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._one: Supervised = self._stack.enter_context(supervised(warm_worker=True))
        self._one.supervisor.start()
        self._versions: list[int] = []

    def teardown(self) -> None:
        self._stack.close()

    @rule(name=NAMES, beside=st.booleans())
    def load(self, name: str, beside: bool) -> None:
        with suppress(Busy):
            self._one.supervisor.load(order(name), beside=beside)

    @rule(name=NAMES, beside=st.booleans())
    def load_at_rest(self, name: str, beside: bool) -> None:
        """With nothing else under way a load is always taken, and ends as its name says."""
        self.come_to_rest()
        until(lambda: self._one.supervisor._owner.job is None, "the last job's end")
        self._one.supervisor.load(order(name), beside=beside)
        self.come_to_rest()
        snapshot = self._one.supervisor.snapshot()
        if name in ("good", "other", "steps=10", "ignore-term"):
            assert snapshot.loaded is not None
            assert (snapshot.state, snapshot.loaded.order.name) == (State.READY, name)
        else:
            assert snapshot.state is (State.CANCELLED if name == "hang" else State.FAILED)

    @rule()
    def cancel(self) -> None:
        self._one.supervisor.cancel()

    @rule()
    def unload(self) -> None:
        self._one.supervisor.unload()
        snapshot = self._one.supervisor.snapshot()
        assert (snapshot.state, snapshot.loaded) == (State.EMPTY, None)
        until(lambda: len(self._one.pids()) <= 1, "no worker but the warm one", 2)

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV]), which=st.integers(0, 2))
    def crash(self, number: signal.Signals, which: int) -> None:
        """One process dies, and the supervisor has seen it: what comes next is not to be blamed on it."""
        for pid in sorted(self._one.pids())[which : which + 1]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            until(partial(self._has_seen_the_end_of, pid), "the process's end")

    def _has_seen_the_end_of(self, pid: int) -> bool:
        owner = self._one.supervisor._owner
        with owner.changed:
            return pid not in {child.pid for child in owner.children}

    @rule(name=st.sampled_from(["good", "other", "refuse", "signal=SIGKILL"]))
    def apply(self, name: str) -> None:
        """LoRAs are active as asked, or as before; a worker that dies of them leaves the last set in its order."""
        supervisor, asked = self._one.supervisor, (AdapterChoice(name, "/loras/any"),)
        before = supervisor.snapshot().loaded
        try:
            supervisor.apply_adapters(asked)
        except AdapterMismatch:
            after = supervisor.snapshot().loaded
            same = before is not None and after is not None and before.since == after.since
            assert not same or before == after
        except WorkerCrashed:
            until(lambda: self._at_rest() or supervisor.snapshot().state in (State.STARTING, State.LOADING), "its end")
        except (Busy, NothingLoaded):
            return
        else:
            loaded = supervisor.snapshot().loaded
            assert loaded is None or loaded.order.adapters == asked

    @rule()
    def reload(self) -> None:
        with suppress(Busy, NothingLoaded):
            self._one.supervisor.reload()

    @rule()
    def come_to_rest(self) -> None:
        """Wait for the load, cancelling one that hangs; then count."""
        supervisor = self._one.supervisor
        snapshot = self._one.when(
            lambda s: s.state not in (State.STARTING, State.LOADING) or bool(s.order and s.order.name == "hang")
        )
        while snapshot.state in (State.STARTING, State.LOADING):
            supervisor.cancel()
            snapshot = supervisor.wait_loaded(5)
        until(self._at_rest, "one process for the model, one at most that waits")
        if supervisor.snapshot().loaded is not None:
            with suppress(NothingLoaded):
                assert text_of(supervisor.generate(prompt("2"))) == "1 2 "

    def _at_rest(self) -> bool:
        snapshot = self._one.supervisor.snapshot()
        children = self._one.supervisor._owner.children
        models = int(snapshot.loaded is not None)
        return self._one.pids() == {child.pid for child in children} and models <= len(children) <= models + 1

    @invariant()
    def the_version_never_falls(self) -> None:
        self._versions.append(self._one.supervisor.snapshot().version)
        assert self._versions == sorted(self._versions)

    @invariant()
    def ready_means_loaded(self) -> None:
        snapshot = self._one.supervisor.snapshot()
        assert snapshot.state is not State.READY or snapshot.loaded is not None
        assert snapshot.state is not State.FAILED or snapshot.error is not None


Sequences.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSequences = Sequences.TestCase
