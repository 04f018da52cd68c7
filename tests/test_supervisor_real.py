"""The supervisor over the real worker and a real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modules.errors import LoadstoneError, WorkerKilled
from modules.options import GenerationOptions, LoadOptions
from modules.protocol import CountOrder, Done, GenerateOrder, LoadOrder, Piece
from modules.supervisor import State, Supervisor
from tests.machine import BF16
from tests.supervised import Workers

LOAD_S = 120.0


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def supervisor(workers: Workers) -> Iterator[Supervisor]:
    supervisor = Supervisor(warm_worker=False)
    yield supervisor
    supervisor.close()
    assert not workers()


def _order(model: Path, cache: Path) -> LoadOrder:
    options = LoadOptions(cpu=True, bf16=BF16)
    return LoadOrder(model.name, str(model), "safetensors", "causal", "", options, 2048, str(cache), str(cache))


def _open_to(supervisor: Supervisor) -> set[int]:
    """The own ports of this process's open connections to the worker."""
    port = supervisor._owner.child.port if supervisor._owner.child else None
    found = psutil.Process().net_connections("tcp")
    return {one.laddr.port for one in found if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED"}


def test_a_real_model_loads_answers_crashes_loads_again_and_unloads(
    supervisor: Supervisor, workers: Workers, demo_model: Path, tmp_path: Path
) -> None:
    supervisor.load(_order(demo_model, tmp_path))
    snapshot = supervisor.wait_loaded(LOAD_S)
    assert snapshot.state is State.READY, snapshot.error
    assert snapshot.loaded is not None
    assert snapshot.loaded.report.architecture == "LlamaForCausalLM"
    assert snapshot.loaded.memory_at_load.rss_bytes > snapshot.loaded.report.footprint_bytes * 0.5
    assert supervisor.count(CountOrder(prompt="Hello there")) > 0

    order = GenerateOrder(GenerationOptions(max_new_tokens=8, temperature=0), ({"role": "user", "content": "Hi!"},))
    *pieces, done = supervisor.generate(order)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)).strip()
    assert isinstance(done, Done)
    assert 0 < done.completion_tokens <= 8
    after = supervisor.snapshot()
    assert after.context_used == done.prompt_tokens + done.completion_tokens
    assert after.tokens_per_second > 0

    connections = _open_to(supervisor)
    for _ in range(3):
        *_, done = supervisor.generate(order)
        assert isinstance(done, Done)
    assert supervisor.memory() is not None
    assert _open_to(supervisor) == connections, "each command has a connection of its own"

    (worker,) = workers()
    long = GenerateOrder(GenerationOptions(max_new_tokens=2000), prompt="Once upon a time")
    answer = supervisor.generate(long)
    next(answer)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerKilled):
        list(answer)
    assert supervisor.wait(after.version, 5).loaded is None

    supervisor.reload()
    assert supervisor.wait_loaded(LOAD_S).state is State.READY
    assert supervisor.memory() is not None
    supervisor.unload()
    assert supervisor.snapshot().state is State.EMPTY


def test_a_model_that_is_not_there_fails_with_the_workers_own_word(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.load(_order(tmp_path / "nothing", tmp_path))
    snapshot = supervisor.wait_loaded(LOAD_S)
    assert snapshot.state is State.FAILED
    assert isinstance(snapshot.error, LoadstoneError)
    assert "nothing" in snapshot.error.message


def test_a_real_worker_that_still_imports_is_cancelled_at_once(
    supervisor: Supervisor, workers: Workers, demo_model: Path, tmp_path: Path
) -> None:
    supervisor.load(_order(demo_model, tmp_path))
    version = 0
    while (snapshot := supervisor.wait(version, LOAD_S)).state is State.STARTING:
        version = snapshot.version
    assert snapshot.state is State.LOADING
    supervisor.cancel()
    assert supervisor.snapshot().state is State.CANCELLED
    assert not workers()
