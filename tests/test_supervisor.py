"""What a person does with the supervisor: load, replace, cancel, unload, close."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import pytest

from modules.errors import Busy, Cancelled, NothingLoaded, OutOfMemory
from modules.protocol import CountOrder, Done, Piece
from modules.supervisor import Snapshot, State
from modules.supervisor.told import Told
from tests.supervised import LIMIT_S, Supervised, living, order, prompt, supervised, text_of, until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cold() -> Iterator[Supervised]:
    with supervised() as one:
        yield one


def name_of(snapshot: Snapshot) -> str:
    return snapshot.loaded.order.name if snapshot.loaded else ""


# --- one load ---


def test_a_load_ends_ready_and_answers(cold: Supervised) -> None:
    snapshot = cold.load("first")
    assert (snapshot.state, name_of(snapshot), snapshot.error) == (State.READY, "first", None)
    answer = list(cold.supervisor.generate(prompt("3")))
    assert [chunk.text for chunk in answer if isinstance(chunk, Piece)] == ["1 ", "2 ", "3 "]
    assert isinstance(answer[-1], Done)
    assert cold.supervisor.count(CountOrder(prompt="four words are here")) == 4
    assert cold.pids() == {cold.worker_pid()}


def test_load_returns_at_once_and_the_page_sees_every_state(cold: Supervised) -> None:
    seen: list[State] = []
    version = cold.supervisor.snapshot().version
    began = time.monotonic()
    cold.supervisor.load(order("slow"))
    assert time.monotonic() - began < 0.5
    while (snapshot := cold.supervisor.wait(version, LIMIT_S)).state is not State.READY:
        assert snapshot.version > version
        version = snapshot.version
        seen.append(snapshot.state)
    assert list(dict.fromkeys(seen)) == [State.STARTING, State.LOADING]


def test_progress_tells_how_long_it_will_take(cold: Supervised) -> None:
    cold.supervisor.load(order("slow"))
    snapshot = cold.when(lambda s: s.progress is not None and s.progress.done >= 50)
    assert snapshot.progress is not None
    assert snapshot.progress.total == 100
    assert snapshot.eta_s is not None
    assert 0.1 < snapshot.eta_s < 10
    assert snapshot.elapsed_s > 0.5
    done = cold.settled()
    assert done.eta_s is None
    assert done.elapsed_s > snapshot.elapsed_s
    assert cold.supervisor.snapshot().elapsed_s == done.elapsed_s  # it stands still once the load is over


def test_wait_returns_at_the_time_limit_when_nothing_changes(cold: Supervised) -> None:
    version = cold.supervisor.snapshot().version
    began = time.monotonic()
    assert cold.supervisor.wait(version, 0.2).version == version
    assert 0.15 < time.monotonic() - began < 5


def test_the_machine_is_measured_before_and_after() -> None:
    figures = iter(range(10))
    with supervised(measure=lambda: next(figures)) as one:
        loaded = one.load("first").loaded
        assert loaded is not None
        assert (loaded.machine_before, loaded.machine_after) == (0, 1)
        assert loaded.memory_at_load.rss_bytes == one.worker_pid()


def test_a_measure_that_fails_does_not_fail_the_load() -> None:
    def broken() -> None:
        raise OSError("no driver")

    with supervised(measure=broken) as one:
        assert one.load("first").state is State.READY


def test_two_loads_at_once_one_wins_and_the_others_are_busy(cold: Supervised) -> None:
    barrier = threading.Barrier(8)
    results: list[str] = []

    def load(name: str) -> None:
        barrier.wait()
        try:
            cold.supervisor.load(order(name))
            results.append("took " + name)
        except Busy as error:
            results.append(error.message.partition("Loadstone is ")[2][:12])

    threads = [threading.Thread(target=load, args=(f"slow {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(results)[:7] == ["loading slow"] * 7
    assert "took " + name_of(cold.settled()) in results
    assert len(cold.pids()) == 1


# --- replacing a model ---


def test_beside_the_old_model_answers_until_the_new_one_is_ready(cold: Supervised) -> None:
    cold.load("old")
    old_pid = cold.worker_pid()
    snapshot = cold.begin("slow new", beside=True)
    assert (snapshot.state, name_of(snapshot)) == (State.LOADING, "old")
    assert snapshot.order is not None
    assert snapshot.order.name == "slow new"
    assert text_of(cold.supervisor.generate(prompt("2"))) == "1 2 "
    assert name_of(cold.settled()) == "slow new"
    until(lambda: old_pid not in cold.pids(), "the old worker's end")
    assert cold.worker_pid() != old_pid


def test_beside_a_failed_load_leaves_the_old_model_untouched(cold: Supervised) -> None:
    cold.load("old")
    old_pid = cold.worker_pid()
    snapshot = cold.load("fail new", beside=True)
    assert (snapshot.state, name_of(snapshot)) == (State.FAILED, "old")
    assert isinstance(snapshot.error, OutOfMemory)
    assert cold.worker_pid() == old_pid
    assert cold.pids() == {old_pid}


def test_otherwise_the_old_model_ends_before_the_new_one_loads(cold: Supervised) -> None:
    cold.load("old")
    old_pid = cold.worker_pid()
    snapshot = cold.begin("slow new")
    assert snapshot.loaded is None
    assert old_pid not in cold.pids()
    with pytest.raises(NothingLoaded, match="slow new is still loading"):
        cold.supervisor.generate(prompt("2"))
    assert name_of(cold.settled()) == "slow new"


def test_a_failed_load_brings_the_old_model_back(cold: Supervised) -> None:
    cold.load("old")
    snapshot = cold.load("fail new")
    assert (snapshot.state, name_of(snapshot)) == (State.FAILED, "old")
    assert isinstance(snapshot.error, OutOfMemory)
    assert snapshot.error.fix == {"load_in_4bit": True}
    assert snapshot.order is not None
    assert snapshot.order.name == "fail new"
    assert snapshot.notes == ("fail new was not loaded. old was brought back.",)
    assert text_of(cold.supervisor.generate(prompt("2"))) == "1 2 "
    assert cold.pids() == {cold.worker_pid()}


def test_while_the_old_model_comes_back_the_error_shows_and_loads_wait(cold: Supervised) -> None:
    cold.load("slow old")
    cold.supervisor.load(order("fail new"))
    snapshot = cold.when(lambda s: s.error is not None)
    assert snapshot.state in (State.STARTING, State.LOADING)
    assert snapshot.order is not None
    assert snapshot.order.name == "slow old"
    with pytest.raises(Busy, match="bringing slow old back"):
        cold.supervisor.load(order("third"))
    assert name_of(cold.settled()) == "slow old"


def test_a_cancelled_load_brings_the_old_model_back(cold: Supervised) -> None:
    cold.load("old")
    cold.begin("hang new")
    cold.supervisor.cancel()
    snapshot = cold.settled()
    assert (snapshot.state, name_of(snapshot)) == (State.CANCELLED, "old")
    assert isinstance(snapshot.error, Cancelled)


def test_bringing_back_can_be_cancelled_too(cold: Supervised) -> None:
    cold.load("slow old")
    cold.supervisor.load(order("fail new"))
    cold.when(lambda s: s.error is not None)
    cold.supervisor.cancel()
    snapshot = cold.settled()
    assert (snapshot.state, snapshot.loaded) == (State.FAILED, None)
    assert "could slow old be brought back" in snapshot.notes[-1]
    until(lambda: not cold.pids(), "the workers' end")


def test_reload_loads_the_same_again_in_a_new_process(cold: Supervised) -> None:
    with pytest.raises(NothingLoaded):
        cold.supervisor.reload()
    cold.load("first")
    pid = cold.worker_pid()
    cold.supervisor.reload()
    assert name_of(cold.settled()) == "first"
    assert cold.pids() == {cold.worker_pid()} != {pid}
    cold.supervisor.unload()
    cold.supervisor.reload()
    assert name_of(cold.settled()) == "first"


def test_reload_means_what_was_there_and_not_what_failed_before(cold: Supervised) -> None:
    assert cold.supervisor.snapshot().last is None
    cold.load("first")
    assert cold.load("fail second").state is State.FAILED
    cold.supervisor.unload()
    last = cold.supervisor.snapshot().last
    assert last is not None
    assert last.name == "first"
    cold.load("fail third")
    cold.supervisor.reload()
    failed = cold.settled()
    assert (failed.state, failed.order and failed.order.name) == (State.FAILED, "fail third")


# --- cancel, unload, close ---


@pytest.mark.parametrize("name", ["hang", "hang ignore-term", "hang grandchild", "hang ignore-term grandchild"])
def test_cancel_ends_the_whole_group_within_two_seconds(cold: Supervised, name: str) -> None:
    cold.begin(name)
    if "grandchild" in name:
        until(lambda: len(cold.pids()) == 2, "the grandchild's start")
    began = time.monotonic()
    cold.supervisor.cancel()
    took_s = time.monotonic() - began
    assert not cold.pids()
    assert took_s < 2
    snapshot = cold.supervisor.snapshot()
    assert (snapshot.state, snapshot.loaded) == (State.CANCELLED, None)
    assert cold.load("next").state is State.READY


@pytest.mark.parametrize("name", ["good", "ignore-term", "grandchild", "ignore-term grandchild"])
def test_unload_ends_the_whole_group_within_two_seconds(cold: Supervised, name: str) -> None:
    cold.load(name)
    if "grandchild" in name:
        until(lambda: len(cold.pids()) == 2, "the grandchild's start")
    began = time.monotonic()
    cold.supervisor.unload()
    took_s = time.monotonic() - began
    assert not cold.pids()
    assert took_s < 2
    assert cold.supervisor.snapshot().state is State.EMPTY
    with pytest.raises(NothingLoaded):
        cold.supervisor.generate(prompt("2"))
    assert cold.supervisor.memory() is None


def test_cancel_and_unload_with_nothing_there_do_nothing(cold: Supervised) -> None:
    cold.supervisor.cancel()
    cold.supervisor.unload()
    assert cold.supervisor.snapshot().state is State.EMPTY


def test_cancel_before_the_worker_listens() -> None:
    with supervised("never-listen") as one:
        one.supervisor.load(order("first"))
        until(one.pids, "the worker's start")
        one.supervisor.cancel()
        assert not one.pids()
        assert one.supervisor.snapshot().state is State.CANCELLED


@pytest.mark.parametrize("beside", [False, True])
def test_unload_during_a_load_ends_both_models_for_good(cold: Supervised, beside: bool) -> None:
    cold.load("old")
    cold.begin("hang new", beside=beside)
    cold.supervisor.unload()
    assert not cold.pids()
    snapshot = cold.supervisor.snapshot()
    assert (snapshot.state, snapshot.loaded) == (State.EMPTY, None)
    assert cold.load("next").state is State.READY


def test_whether_it_works_can_be_asked_while_work_is_given(cold: Supervised) -> None:
    cold.load("first")
    supervisor, given = cold.supervisor, []

    def give() -> None:
        given.append(supervisor.tell("/embed", None))

    class Interrupted(WeakSet[Told]):
        """While somebody looks through it, another thread gives more work."""

        def __iter__(self) -> Iterator[Told]:
            for one in super().__iter__():
                giving.start()
                giving.join(0.2)
                yield one

    first, giving = supervisor.tell("/embed", None), threading.Thread(target=give)
    supervisor._told = Interrupted([first])
    assert not supervisor.working
    giving.join(LIMIT_S)
    assert len(given) == 1


@pytest.mark.parametrize("when", ["starting", "loading", "ready", "generating"])
def test_close_leaves_no_process(when: str) -> None:
    with supervised(warm_worker=True) as one:
        one.supervisor.start()
        if when == "starting":
            one.supervisor.load(order("hang"))
        elif when == "loading":
            one.begin("hang ignore-term grandchild")
        else:
            one.load("good")
        if when == "generating":
            next(one.supervisor.generate(prompt("forever")))
        one.supervisor.close()
        assert not one.pids()
        one.supervisor.close()
        with pytest.raises(Cancelled):
            one.supervisor.load(order("next"))
        assert not one.pids()


_PARENT = """
import sys, time
from tests.supervised import FAKE_WORKER, order
from modules.supervisor import Supervisor
supervisor = Supervisor(command=(sys.executable, FAKE_WORKER, sys.argv[1]))
supervisor.start()
supervisor.load(order("good"))
supervisor.wait_loaded(30)
snapshot = supervisor.snapshot()
while not snapshot.warm:
    snapshot = supervisor.wait(snapshot.version, 30)
print(snapshot.state, flush=True)
if sys.argv[2] == "stay":
    time.sleep(3600)
"""


@pytest.mark.parametrize("how", ["stay", "leave"])
def test_no_worker_outlives_its_parent(how: str) -> None:
    """``stay``: the parent is killed by SIGKILL. ``leave``: it ends without closing."""
    tag = f"TAG=parent-{time.monotonic_ns()}"
    command = [sys.executable, "-c", _PARENT, tag, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == "ready"
        if how == "stay":
            assert len(living(tag) - {parent.pid}) == 2  # the model's and the warm one
            parent.kill()
        parent.wait(LIMIT_S)
    until(lambda: not living(tag), "the workers' end after the parent's", 5)
