"""What the tests share: the real demo model, made once and kept between runs, and real worker processes."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library of the Hub reads it; nothing here may need the network

import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import pytest

from modules.options import LoadOptions
from modules.protocol import (
    COUNT,
    GENERATE,
    LOAD,
    MEMORY,
    Chunk,
    CountOrder,
    Event,
    GenerateOrder,
    Hello,
    Listening,
    LoadOrder,
    Memory,
    Piece,
    Ready,
    decode,
    encode,
)
from tests import checkpoints
from tests.machine import BF16

ROOT = Path(__file__).resolve().parent.parent
E = TypeVar("E")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct. Treat it as read-only."""
    return checkpoints.demo_model()


class WorkerProcess:
    """A real ``python -m modules.worker``, started and spoken to as the supervisor does it."""

    def __init__(self, hello: Hello | None = None, code: str = "", **environment: str) -> None:
        """``code`` runs in the process before the worker does, for what a library might do there."""
        hello = hello or Hello(secrets.token_hex(16))
        self.secret = hello.secret
        command = (
            ["-m", "modules.worker"] if not code else ["-c", f"{code}\nimport modules.worker.__main__ as m; m.main()"]
        )
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.lines: list[bytes] = []  # all that came on stdout
        self._events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(hello)
        self.port = self.wait_for(Listening).port

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            with suppress(ValueError):
                self._events.put(decode(line))
        self._events.put(None)

    def tell(self, message: Any) -> None:
        """Write one line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(encode(message))
        self.process.stdin.flush()

    def wait_for(self, kind: type[E], limit_s: float = 120) -> E:
        """The next event of that kind; those before it are passed over. Fails where the process ends first."""
        end = time.monotonic() + limit_s
        while (event := self._events.get(timeout=max(0.01, end - time.monotonic()))) is not None:
            if isinstance(event, kind):
                return event
        raise AssertionError(f"The worker ended with {self.process.wait()} before {kind.__name__}.")

    def http(self, secret: str | None = None) -> httpx.Client:
        """A client with its own connections, that brings the secret."""
        headers = {"authorization": f"Bearer {self.secret if secret is None else secret}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def post(self, path: str, message: Any) -> httpx.Response:
        """The answer to one command."""
        with self.http() as client:
            return client.post(path, content=encode(message))

    def load(self, order: LoadOrder) -> Ready:
        """Load a model and wait until it is there."""
        assert self.post(LOAD, order).status_code == 202
        return self.wait_for(Ready)

    @contextmanager
    def generating(self, order: GenerateOrder) -> Iterator[Iterator[Chunk]]:
        """The chunks of an answer as they come. Leaving the context closes the connection."""
        with self.http() as client, client.stream("POST", GENERATE, content=encode(order)) as response:
            assert response.status_code == 200
            yield (decode(line) for line in response.iter_lines())

    def generate(self, order: GenerateOrder) -> tuple[str, Chunk]:
        """The whole text of an answer, and its last chunk."""
        with self.generating(order) as stream:
            *pieces, last = stream
        return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), last

    def count(self, order: CountOrder) -> int:
        """How many tokens a prompt has."""
        return int(self.post(COUNT, order).json()["tokens"])

    def memory(self) -> Memory:
        """What the process holds."""
        with self.http() as client:
            memory = decode(client.get(MEMORY).content)
        assert isinstance(memory, Memory)
        return memory

    def close_stdin(self) -> None:
        """What happens to a worker whose web process is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        """End its whole process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class StartWorker(Protocol):
    """Starts a worker that is ended when the test is over."""

    def __call__(self, hello: Hello | None = None, code: str = "", **environment: str) -> WorkerProcess: ...


@pytest.fixture(scope="session")
def start_shared_worker() -> Iterator[StartWorker]:
    """As :func:`start_worker`, for workers that live as long as the run."""
    yield from _starter()


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Starts real workers; each is ended after the test."""
    yield from _starter()


def _starter() -> Iterator[StartWorker]:
    started: list[WorkerProcess] = []

    def start(hello: Hello | None = None, code: str = "", **environment: str) -> WorkerProcess:
        started.append(WorkerProcess(hello, code, **environment))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


@pytest.fixture
def worker(start_worker: StartWorker) -> WorkerProcess:
    """A worker that has begun to import the ML packages and holds no model."""
    return start_worker()


@pytest.fixture(scope="session")
def demo_worker(start_shared_worker: StartWorker, demo_order: LoadOrder) -> WorkerProcess:
    """A worker that holds the demo model, shared by all tests that do not end it."""
    worker = start_shared_worker()
    worker.load(demo_order)
    return worker


@pytest.fixture(scope="session")
def demo_order(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadOrder:
    """The order to load the demo model as it is stored, on the CPU, with a context of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("worker")
    return LoadOrder(
        name=demo_model.name,
        path=str(demo_model),
        file_format="safetensors",
        task="causal",
        quantization="",
        options=LoadOptions(model=demo_model.name, cpu=True, bf16=BF16),
        ctx_tokens=2048,
        offload_dir=str(folder / "offload"),
        cache_dir=str(folder / "cache"),
    )


def wait_until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    """Return as soon as ``condition`` holds. Fails after ``limit_s``."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s"
        time.sleep(0.01)
