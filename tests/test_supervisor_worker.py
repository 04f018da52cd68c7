"""The workers themselves: the warm one, and what surrounds each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modules.protocol import LoadOrder
from modules.supervisor import State, Supervisor
from tests.supervised import LIMIT_S, Supervised, order, supervised, until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cold() -> Iterator[Supervised]:
    with supervised() as one:
        yield one


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


def test_a_warm_worker_whose_imports_failed_is_noted_and_not_used() -> None:
    with supervised("fail-warm", warm_worker=True) as one:
        one.supervisor.start()
        snapshot = one.when(lambda s: bool(s.notes))
        assert "torch is missing" in snapshot.notes[0]
        until(lambda: not one.pids(), "its end")
        assert one.load("first").state is State.READY


def test_a_warm_worker_from_before_an_installation_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path), str(tmp_path / "none")])
    with supervised(warm_worker=True) as one:
        one.supervisor.start()
        one.when(lambda s: s.warm)
        (stale_pid,) = one.pids()
        os.utime(tmp_path, (time.time() + 5, time.time() + 5))  # as an installation does
        one.load("first")
        assert one.worker_pid() != stale_pid
        until(lambda: stale_pid not in one.pids(), "the stale worker's end")


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
        "import sys; before = set(sys.modules); import modules.supervisor; new = set(sys.modules) - before;"
        "print(*{name.partition('.')[0] for name in new} - sys.stdlib_module_names);"
        "print(*{'http.client', 'asyncio', 'multiprocessing', 'email'} & new)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines() == ["modules", ""]


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
