"""LoRAs by the supervisor: what it writes down, what it refuses, and what comes back after a crash."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from modules.errors import AdapterMismatch, Busy, Cancelled, LoadstoneError, NothingLoaded, WorkerKilled
from modules.protocol import AdapterChoice, AdaptersReport
from modules.supervisor import Snapshot, State
from tests.supervised import LIMIT_S, Supervised, order, supervised, until

PAIR = (AdapterChoice("one", "/loras/one", 0.5), AdapterChoice("two", "/loras/two"))
HANG = (AdapterChoice("hang", "/loras/hang"),)


@pytest.fixture
def one() -> Iterator[Supervised]:
    with supervised() as one:
        yield one


def active(snapshot: Snapshot) -> tuple[AdapterChoice, ...]:
    assert snapshot.loaded is not None
    return snapshot.loaded.order.adapters


def applying(one: Supervised, adapters: tuple[AdapterChoice, ...]) -> Future[AdaptersReport]:
    """Apply on another thread; returns when the supervisor is at it."""
    future: Future[AdaptersReport] = Future()

    def apply() -> None:
        try:
            future.set_result(one.supervisor.apply_adapters(adapters))
        except LoadstoneError as error:
            future.set_exception(error)

    threading.Thread(target=apply, daemon=True).start()
    until(lambda: one.supervisor._owner.job is not None or future.done(), "the supervisor's taking it")
    return future


def test_what_is_applied_is_written_down_and_told(one: Supervised) -> None:
    before = one.load("model")
    assert before.loaded is not None
    assert before.loaded.adapters is None
    report = one.supervisor.apply_adapters(PAIR)
    after = one.supervisor.wait(before.version, LIMIT_S)
    assert after.loaded is not None
    assert (report.adapters, report.moved_nats) == (PAIR, 1.5)
    assert (active(after), after.loaded.adapters) == (PAIR, report)
    assert after.order == after.loaded.order
    assert after.state is State.READY
    assert one.supervisor.apply_adapters(()).moved_nats is None
    assert active(one.supervisor.snapshot()) == ()


def test_an_order_that_names_loras_comes_ready_with_them(one: Supervised) -> None:
    one.supervisor.load(replace(order("model"), adapters=PAIR))
    loaded = one.settled().loaded
    assert loaded is not None
    assert loaded.adapters is not None
    assert (loaded.order.adapters, loaded.adapters.adapters) == (PAIR, PAIR)


def test_a_refused_set_changes_nothing(one: Supervised) -> None:
    one.load("model")
    one.supervisor.apply_adapters(PAIR)
    before = one.supervisor.snapshot()
    with pytest.raises(AdapterMismatch, match="no such LoRA"):
        one.supervisor.apply_adapters((AdapterChoice("refuse", "/loras/x"),))
    after = one.supervisor.snapshot()
    assert (after.loaded, after.state, after.error) == (before.loaded, State.READY, None)
    assert one.supervisor.apply_adapters(()).adapters == ()  # the next one is taken


def test_without_a_model_there_is_nothing_to_apply_to(one: Supervised) -> None:
    with pytest.raises(NothingLoaded):
        one.supervisor.apply_adapters(PAIR)


def test_the_worker_killed_meanwhile_leaves_the_set_that_was_last_active(one: Supervised) -> None:
    one.load("model")
    one.supervisor.apply_adapters(PAIR)
    with pytest.raises(WorkerKilled):
        one.supervisor.apply_adapters((AdapterChoice("signal=SIGKILL", "/loras/x"),))
    crashed = one.when(lambda s: s.loaded is None)
    assert crashed.state is State.FAILED
    assert crashed.order is not None
    assert crashed.order.adapters == PAIR
    one.supervisor.reload()
    assert active(one.settled()) == PAIR


@pytest.mark.parametrize("beside", [False, True])
def test_reload_and_roll_back_bring_the_set_back(one: Supervised, beside: bool) -> None:
    one.load("model")
    one.supervisor.apply_adapters(PAIR)
    one.supervisor.reload()
    assert active(one.settled()) == PAIR
    failed = one.load("fail", beside=beside)
    assert failed.state is State.FAILED
    assert active(failed) == PAIR
    assert failed.loaded is not None
    assert failed.loaded.order.name == "model"
    assert failed.loaded.adapters is not None


def test_a_load_has_to_wait_and_a_cancel_does_not_end_the_model(one: Supervised) -> None:
    one.load("model")
    future = applying(one, HANG)
    with pytest.raises(Busy, match="applying LoRAs to model"):
        one.supervisor.load(order("other"))
    with pytest.raises(Busy):
        one.supervisor.apply_adapters(PAIR)
    one.supervisor.cancel()
    assert not future.done()
    assert one.worker_pid() in one.pids()


def test_an_unload_ends_a_change_of_loras(one: Supervised) -> None:
    one.load("model")
    future = applying(one, HANG)
    one.supervisor.unload()
    snapshot = one.supervisor.snapshot()
    assert (snapshot.state, snapshot.loaded, snapshot.error) == (State.EMPTY, None, None)
    assert isinstance(future.exception(LIMIT_S), Cancelled)
    assert not one.pids()


def test_no_set_can_be_applied_while_a_model_loads(one: Supervised) -> None:
    one.load("model")
    one.begin("hang", beside=True)
    with pytest.raises(Busy, match="loading hang"):
        one.supervisor.apply_adapters(PAIR)
    one.supervisor.cancel()
    assert one.supervisor.apply_adapters(PAIR).adapters == PAIR
