"""What the benchmarks share: a server under test, bare scripts, medians."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / ".cache" / "fixtures"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``goal`` in words, as the aim is stated."""

    what: str
    ours: str
    bare: str
    ratio: str
    goal: str


def ratio_row(what: str, ours: float, bare: float, unit: str, goal: str) -> Row:
    return Row(what, f"{ours:.2f} {unit}", f"{bare:.2f} {unit}", f"{ours / bare:.2f} ×", goal)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def medians(functions: Sequence[Callable[[], float]], runs: int) -> list[float]:
    """The median of each function's result; they take turns, so that a slow spell of the machine hits all."""
    results: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for index, function in enumerate(functions):
            results[index].append(function())
    return [statistics.median(values) for values in results]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def started(
    command: Sequence[str], port: int, timeout_s: float = 120, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A web process and the seconds from its start to its first page; ``variables`` of its environment."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment() | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read()
                break
            if process.poll() is not None or time.perf_counter() - begun > timeout_s:
                raise RuntimeError(f"{command} did not serve a page")
            time.sleep(0.01)
        yield process, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(20)


def server_command(port: int, *flags: str) -> list[str]:
    models = str(FIXTURES / "models")
    return [sys.executable, "server.py", "--listen-port", str(port), "--no-hf-cache", "--model-dir", models, *flags]


def call(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer of one of the server's routes."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return dict(json.load(answer))


def bare_script(source: str, *arguments: str) -> dict[str, float]:
    """Run a script that prints one line of JSON last; its numbers and the process's own seconds as ``wall``."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return {"wall": time.perf_counter() - begun, **json.loads(done.stdout.strip().splitlines()[-1])}
