"""Workers that die, hang and talk nonsense: what becomes of the load, the model and the next load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from modules.errors import (
    LoadstoneError,
    NothingLoaded,
    OutOfMemory,
    UnsupportedModel,
    WorkerCrashed,
    WorkerKilled,
    WorkerTimeout,
)
from modules.supervisor import State
from tests.supervised import LIMIT_S, Supervised, order, prompt, supervised, text_of, until


@pytest.fixture
def cold() -> Iterator[Supervised]:
    with supervised() as one:
        yield one


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("signal=SIGKILL", WorkerKilled, "SIGKILL"),
        ("signal=SIGTERM", WorkerKilled, "ended from outside (SIGTERM)"),
        ("signal=SIGSEGV", WorkerCrashed, "SIGSEGV"),
        ("signal=SIGBUS", WorkerCrashed, "SIGBUS"),
        ("signal=SIGABRT", WorkerCrashed, "SIGABRT"),
        ("exit=3", WorkerCrashed, "exit status 3"),
        ("exit=0", WorkerCrashed, "exit status 0"),
    ],
)
def test_a_worker_that_dies_while_loading(cold: Supervised, name: str, kind: type[LoadstoneError], words: str) -> None:
    snapshot = cold.load(name)
    assert (snapshot.state, snapshot.loaded) == (State.FAILED, None)
    assert type(snapshot.error) is kind
    assert words in snapshot.error.message
    assert "last words" in snapshot.error.details
    assert "last words" in snapshot.log
    assert not cold.pids()
    assert cold.load("next").state is State.READY


@pytest.mark.parametrize(("name", "kind"), [("fail", OutOfMemory), ("refuse", UnsupportedModel)])
def test_a_load_that_the_worker_gives_up(cold: Supervised, name: str, kind: type[LoadstoneError]) -> None:
    snapshot = cold.load(name)
    assert (snapshot.state, type(snapshot.error)) == (State.FAILED, kind)
    assert not cold.pids()


def test_a_worker_that_dies_before_it_listens() -> None:
    with supervised("exit=9") as one:
        snapshot = one.load("first")
        assert snapshot.state is State.FAILED
        assert "exit status 9" in str(snapshot.error)


def test_a_worker_that_never_listens() -> None:
    with supervised("never-listen", "ignore-term", start_timeout_s=0.5) as one:
        snapshot = one.load("first")
        assert snapshot.state is State.FAILED
        assert type(snapshot.error) is WorkerTimeout
        assert "0.5 s" in snapshot.error.message
        assert not one.pids()


@pytest.mark.parametrize("how", ["signal=SIGKILL", "signal=SIGSEGV", "exit=5"])
def test_a_worker_that_dies_while_it_answers(cold: Supervised, how: str) -> None:
    cold.load("good")
    with pytest.raises(WorkerCrashed) as raised:
        list(cold.supervisor.generate(prompt(how)))
    snapshot = cold.when(lambda s: s.state is State.FAILED)
    assert type(snapshot.error) is type(raised.value)
    assert snapshot.error.message == raised.value.message
    assert snapshot.loaded is None
    assert "last words" in snapshot.log
    with pytest.raises(NothingLoaded):
        cold.supervisor.generate(prompt("2"))
    assert cold.load("next").state is State.READY
    assert text_of(cold.supervisor.generate(prompt("2"))) == "1 2 "


def test_a_worker_that_dies_while_it_waits(cold: Supervised) -> None:
    cold.load("grandchild")
    until(lambda: len(cold.pids()) == 2, "the grandchild's start")
    os.kill(cold.worker_pid(), signal.SIGKILL)
    snapshot = cold.when(lambda s: s.state is State.FAILED)
    assert isinstance(snapshot.error, WorkerKilled)
    assert snapshot.order is not None
    assert snapshot.order.name == "grandchild"
    assert not cold.pids()  # what it had started ended with it
    cold.supervisor.reload()
    assert cold.settled().state is State.READY


def test_the_old_worker_dies_while_another_loads_beside_it(cold: Supervised) -> None:
    cold.load("old")
    cold.begin("slow new", beside=True)
    os.kill(cold.worker_pid(), signal.SIGKILL)
    snapshot = cold.when(lambda s: bool(s.notes))
    assert "old ended meanwhile" in snapshot.notes[0]
    assert (snapshot.state, snapshot.loaded) == (State.LOADING, None)
    done = cold.settled()
    assert (done.state, done.error) == (State.READY, None)


def test_the_old_model_cannot_be_brought_back(cold: Supervised) -> None:
    cold.load("slow old")
    cold.supervisor.load(order("fail new"))
    cold.when(lambda s: s.error is not None and s.progress is not None)
    (pid,) = cold.pids()
    os.kill(pid, signal.SIGKILL)
    snapshot = cold.settled()
    assert (snapshot.state, snapshot.loaded) == (State.FAILED, None)
    assert isinstance(snapshot.error, OutOfMemory)
    assert "Nor could slow old be brought back" in snapshot.notes[-1]
    assert "SIGKILL" in snapshot.notes[-1]
    assert cold.load("next").state is State.READY


def test_what_is_printed_on_stdout_goes_to_the_log_and_harms_nothing(cold: Supervised) -> None:
    snapshot = cold.load("garbage")
    assert snapshot.state is State.READY
    assert "garbage \ufffd on stdout" in snapshot.log


def test_the_log_is_short_and_a_progress_bar_is_one_line(cold: Supervised) -> None:
    cold.load("bar")
    snapshot = cold.when(lambda s: bool(s.log) and s.log[-1] == "100%")
    assert len(snapshot.log) == 200
    assert snapshot.log[-2] == "line 299"


def test_a_worker_that_hangs_while_it_answers_can_be_unloaded(cold: Supervised) -> None:
    cold.load("ignore-term")
    worker = psutil.Process(cold.worker_pid())
    worker.suspend()
    until(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker's stop")
    began = time.monotonic()
    assert cold.supervisor.memory() is None
    assert time.monotonic() - began < LIMIT_S
    cold.supervisor.unload()
    assert not cold.pids()
