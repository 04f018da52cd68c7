"""A real server process for each test that asks for one, on a home folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import chromium
from tests.e2e.gate import Gate, gated_model

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 120
EXPECT_MS = 20_000  # Playwright's own 5 s are short where two cores are shared by browser, server, worker and a Hub


@dataclass
class Server:
    """A running server.py; its output is kept for the message of a failing test."""

    process: subprocess.Popen[str]
    home: Path
    url: str = ""
    output: list[str] = field(default_factory=list)
    reader: threading.Thread = field(init=False)  # ends when all of the output is there

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=_read, args=(self,), daemon=True)
        self.reader.start()

    def call(self, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> Any:
        """(status, JSON) of one route."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def info(self) -> dict[str, Any]:
        return dict(self.call("/v1/internal/model/info")[1])

    def load(self, name: str, *, wait: bool = True, **args: Any) -> Any:
        return self.call("/v1/internal/model/load", {"model_name": name, "args": args, "wait": wait})

    def wait_state(self, *states: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        return dict(wait_for(lambda: (info := self.info())["state"] in states and info, f"state {states}", timeout_s))

    def workers(self) -> list[psutil.Process]:
        """Every worker process of this server, warm or loaded."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    """What ``condition`` returns once that is true. Fails the test after ``timeout_s``."""
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        if result := condition():
            return result
        time.sleep(0.05)
    pytest.fail(f"waited {timeout_s:g} s for {what}")


def start_server(home: Path, *flags: str) -> Server:
    """A server that has said its address."""
    command = [sys.executable, "server.py", "--listen-port", "0", "--no-hf-cache", "--home", str(home), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server = Server(process, home)
    wait_for(lambda: server.url or process.poll() is not None, "the server's address", WAIT_S)
    assert server.url, "".join(server.output)
    return server


@contextlib.contextmanager
def serving(home: Path, *flags: str) -> Iterator[Server]:
    """A server while the block runs."""
    server = start_server(home, *flags)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(15)


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    """What is to be seen may take a while on a busy machine."""
    expect.set_options(timeout=EXPECT_MS)


@pytest.fixture
def home(tmp_path: Path, demo_model: Path) -> Path:
    """A home folder with the demo model in it, by a link."""
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    (models / demo_model.name).symlink_to(demo_model, target_is_directory=True)
    return models.parent


@pytest.fixture
def launch(home: Path) -> Iterator[Callable[..., Server]]:
    """Start a server with flags; ended, workers and all, after the test."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(start_server(home, *flags))
        return servers[-1]

    yield start
    for server in servers:
        workers = server.workers()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(15)
        _, alive = psutil.wait_procs(workers, timeout=5)
        for worker in alive:
            os.kill(worker.pid, signal.SIGKILL)
        assert not alive, f"the server left workers behind: {alive}"


def _read(server: Server) -> None:
    assert server.process.stdout
    for line in server.process.stdout:
        server.output.append(line)
        if "runs at " in line:
            server.url = line.split("runs at ")[1].strip()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open the page of a server in a browser of its own; errors in its console fail the test."""
    contexts = []
    errors: list[str] = []

    def opened(server: Server, *, width: int = 1280, height: int = 900) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#model input")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors, errors


@pytest.fixture(scope="module")
def quiet_server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module's tests that load nothing."""
    models = tmp_path_factory.mktemp("home") / "models"
    models.mkdir()
    (models / demo_model.name).symlink_to(demo_model, target_is_directory=True)
    with serving(models.parent, "--no-warm-worker") as server:
        yield server


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """A gated model in a home of the module's own; ``shared``, which the module makes, is a server on that home."""
    models = tmp_path_factory.mktemp("home") / "models"
    models.mkdir()
    return gated_model(models)


@pytest.fixture
def server(shared: Server, gate: Gate) -> Iterator[Server]:
    """The module's server with nothing loaded, and the gate closed."""
    gate.close()
    yield shared
    gate.open()
    assert shared.call("/v1/internal/model/unload", {})[0] == 200
