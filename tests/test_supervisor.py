"""What a person does with the supervisor: load, use, replace, cancel, unload, close."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modules.errors import Busy, Cancelled, LoadstoneError, NothingLoaded, OutOfMemory, RequestTooLong
from modules.protocol import CountOrder, Done, Failed, LoadOrder, Piece
from modules.supervisor import Snapshot, State, Supervisor
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


# --- the warm worker ---


def test_the_warm_worker_takes_the_order_and_another_one_follows() -> None:
    with supervised(warm_worker=True) as one:
        one.supervisor.start()
        one.when(lambda s: s.warm)
        (warm_pid,) = one.pids()
        one.load("first")
        assert one.worker_pid() == warm_pid
        one.when(lambda s: s.warm)
        assert len(one.pids()) == 2
        one.supervisor.unload()
        assert len(one.pids()) == 1
        assert warm_pid not in one.pids()


def test_a_warm_worker_that_dies_is_noted_and_not_started_in_a_loop() -> None:
    with supervised("die-warm", warm_worker=True) as one:
        one.supervisor.start()
        snapshot = one.when(lambda s: bool(s.notes))
        assert "exit status 7" in snapshot.notes[0]
        assert not snapshot.warm
        assert one.supervisor.wait(one.supervisor.snapshot().version, 0.5).notes == snapshot.notes
        assert not one.pids()
        assert one.load("first").state is State.READY  # started cold


def test_a_warm_worker_killed_just_before_a_load_does_not_fail_it() -> None:
    with supervised(warm_worker=True) as one:
        one.supervisor.start()
        one.when(lambda s: s.warm)
        psutil.Process(*one.pids()).kill()
        assert one.load("first").state is State.READY


# --- answers ---


def test_several_answers_at_once_from_several_threads(cold: Supervised) -> None:
    cold.load("good")
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(text_of(cold.supervisor.generate(prompt("20"))))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    cold.when(lambda s: s.generating >= 2)
    for thread in threads:
        thread.join(LIMIT_S)
    assert texts == ["".join(f"{number} " for number in range(1, 21))] * 5
    snapshot = cold.when(lambda s: s.generating == 0)
    assert snapshot.context_used == 30


def test_the_rate_is_told_while_it_runs_and_afterwards(cold: Supervised) -> None:
    cold.load("good")
    answer = cold.supervisor.generate(prompt("forever"))
    for _ in range(20):
        next(answer)
    assert 10 < cold.supervisor.snapshot().tokens_per_second < 200.1  # one a 5 ms at most
    answer.close()
    assert cold.supervisor.snapshot().tokens_per_second > 10
    list(cold.supervisor.generate(prompt("11")))
    assert cold.supervisor.snapshot().tokens_per_second == pytest.approx(10 / (11 / 50))


def test_closing_an_answer_stops_the_worker(cold: Supervised) -> None:
    cold.load("good")
    answer = cold.supervisor.generate(prompt("forever"))
    assert next(answer) == Piece("1 ", 1)
    assert cold.supervisor.snapshot().generating == 1
    answer.close()
    answer.close()
    assert list(answer) == []
    assert cold.supervisor.snapshot().generating == 0
    cold.when(lambda s: "the reader went away" in s.log)


def test_leaving_the_loop_stops_the_worker(cold: Supervised) -> None:
    cold.load("good")
    for _ in cold.supervisor.generate(prompt("forever")):
        break
    assert cold.supervisor.snapshot().generating == 0
    cold.when(lambda s: "the reader went away" in s.log)


@pytest.mark.parametrize("text", ["mute", "hang"])
def test_an_answer_can_be_closed_while_another_thread_waits_for_it(cold: Supervised, text: str) -> None:
    cold.load("good")
    answer = cold.supervisor.generate(prompt(text))
    chunks: list[object] = []
    reader = threading.Thread(target=lambda: chunks.extend(answer))
    reader.start()
    cold.when(lambda s: s.generating == 1)
    until(lambda: answer._response is not None, "the worker's response")
    began = time.monotonic()
    answer.close()
    reader.join(LIMIT_S)
    assert time.monotonic() - began < 2
    assert len(chunks) == (text == "hang")
    assert text_of(cold.supervisor.generate(prompt("2"))) == "1 2 "  # the worker lives on


def test_what_the_worker_says_of_an_answer_comes_through(cold: Supervised) -> None:
    cold.load("good")
    with pytest.raises(RequestTooLong, match="short"):
        next(cold.supervisor.generate(prompt("too long")))
    *_, last = cold.supervisor.generate(prompt("fail"))
    assert isinstance(last, Failed)
    assert isinstance(last.error, OutOfMemory)
    with pytest.raises(LoadstoneError, match="broke the connection"):
        list(cold.supervisor.generate(prompt("cut")))
    assert cold.supervisor.snapshot().state is State.READY


def test_unloading_ends_an_answer_with_a_word(cold: Supervised) -> None:
    cold.load("good")
    answer = cold.supervisor.generate(prompt("forever"))
    next(answer)
    cold.supervisor.unload()
    with pytest.raises(Cancelled, match="unloaded"):
        list(answer)
    assert cold.supervisor.snapshot().generating == 0


# --- the worker's surroundings ---


def test_the_worker_is_offline_and_has_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-for-this-test")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "a-secret-for-this-test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    with supervised() as one:
        loaded = one.load("good").loaded
    assert loaded is not None
    seen = loaded.report.kwargs
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & set(seen)
    assert "a-secret-for-this-test" not in str(seen)
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert seen["cwd"] == str(ROOT)  # so that no folder can put a module of its own before Loadstone's


def test_the_secret_stands_neither_in_the_environment_nor_in_the_arguments(cold: Supervised) -> None:
    loaded = cold.load("good").loaded
    child = cold.supervisor._owner.child
    assert loaded is not None
    assert child is not None
    assert len(child._secret) >= 32
    assert child._secret not in str(loaded.report.kwargs)


def test_importing_it_stays_light() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import modules.supervisor;"
        "print(time.perf_counter() - began);"
        "print(*{'torch', 'gradio', 'transformers', 'httpx', 'http.client', 'numpy'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
        for _ in range(3)
    ]
    assert {run.splitlines()[1] for run in runs} == {""}
    assert min(float(run.splitlines()[0]) for run in runs) < 0.1


def test_a_command_that_cannot_be_started_is_a_failed_load() -> None:
    supervisor = Supervisor(command=("/nowhere/python",), warm_worker=True)
    try:
        supervisor.start()
        assert "could not be started" in supervisor.snapshot().notes[0]
        supervisor.load(LoadOrder(**vars(order("first"))))
        snapshot = supervisor.wait_loaded(LIMIT_S)
        assert snapshot.state is State.FAILED
        assert "could not be started" in str(snapshot.error)
    finally:
        supervisor.close()
