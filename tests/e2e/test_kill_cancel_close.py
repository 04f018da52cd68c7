"""Real processes killed: the page stays, nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import Server, wait_for
from tests.e2e.test_load_from_the_browser import NAME, ask, select_model
from tests.machine import QUICK_FLAGS, QUICK_OPTIONS


def loaded_worker(server: Server) -> psutil.Process:
    """The one worker; the servers here keep no warm one."""
    found: psutil.Process = wait_for(lambda: next(iter(server.workers()), None), "a worker")
    return found


def assert_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, f"still there after {timeout_s} s: {alive}"


def when_gone(process: psutil.Process, times: list[float]) -> None:
    """Add the time of day at which a process has ended."""
    psutil.wait_procs([process])
    times.append(time.time())


# From the click that the browser is told of: how long it takes to be told is the driver's and the machine's.
_WHEN_CLICKED = "addEventListener('click', at => at.target.closest('#cancel') && (window.clicked = Date.now()), true)"


def test_worker_killed_while_loading(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker")
    page = open_page(server)
    select_model(page)
    server.load(NAME, wait=False, load_in_4bit=True)
    os.kill(loaded_worker(server).pid, signal.SIGKILL)
    info = server.wait_state("failed")
    assert info["error"]["kind"] == "worker_killed"
    expect(page.locator("#card")).to_contain_text("killed")
    status, info = server.load(NAME, **QUICK_OPTIONS)
    assert (status, info["state"]) == (200, "ready")
    expect(page.locator("#card")).to_contain_text("Ready")


def test_worker_killed_while_generating(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker", "--model", NAME, *QUICK_FLAGS, "--max-new-tokens", "2000")
    server.wait_state("ready")
    page = open_page(server)
    ask(page, "Write a very long story.")
    expect(page.locator("#chatbot .bot").last).to_contain_text(" ", timeout=30_000)
    os.kill(loaded_worker(server).pid, signal.SIGKILL)
    expect(page.locator("#chat-line")).to_contain_text("killed", timeout=10_000)
    assert server.wait_state("failed")["error"]["kind"] == "worker_killed"
    assert server.load(NAME, **QUICK_OPTIONS)[1]["state"] == "ready"


def test_cancel_while_loading(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker")
    page = open_page(server)
    select_model(page)
    page.locator("#load").click()
    times: list[float] = []
    ended = threading.Thread(target=when_gone, args=(loaded_worker(server), times))
    ended.start()
    page.evaluate(_WHEN_CLICKED)
    page.locator("#cancel").click()
    ended.join(30)
    assert times, "still there after 30 s"
    assert times[0] - page.evaluate("window.clicked") / 1000 < 2
    server.wait_state("cancelled", "empty")
    expect(page.locator("#load")).to_be_enabled()


def test_a_program_cancels_a_load_and_keeps_what_was_there(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200
    server.load(NAME, wait=False, ctx_size=1024)
    wait_for(lambda: server.info()["state"] == "loading", "a load under way", 60)
    assert server.call("/v1/internal/model/cancel", {})[0] == 200
    info = server.wait_state("cancelled")
    assert info["model_name"] == NAME
    assert info["context_tokens"] != 1024
    assert server.workers()
    assert server.call("/v1/internal/model/cancel", {})[0] == 200  # nothing is under way
    assert server.info()["model_name"] == NAME


def test_unload_ends_the_process(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200
    worker = loaded_worker(server)
    server.call("/v1/internal/model/unload", {})
    assert_gone([worker], 0.5)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_closing_the_server_leaves_no_worker(launch: Callable[..., Server], end: signal.Signals) -> None:
    server = launch("--model", NAME, *QUICK_FLAGS)
    server.wait_state("ready")
    wait_for(lambda: len(server.workers()) >= 2, "the loaded worker and the warm one", 60)
    workers = server.workers()
    server.process.send_signal(end)
    server.process.wait(10)
    assert_gone(workers, 3)


def test_closing_while_loading_leaves_no_worker(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    server.load(NAME, wait=False, load_in_4bit=True)
    worker = loaded_worker(server)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(10)
    assert_gone([worker], 3)


def test_two_loads_at_once_one_wins(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    answers: list[tuple[int, dict[str, object]]] = []
    threads = [threading.Thread(target=lambda: answers.append(server.load(NAME, **QUICK_OPTIONS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in answers) == [200, 409]
    [refused] = [body for status, body in answers if status == 409]
    assert refused["error"]["kind"] == "busy"  # type: ignore[index]
    assert server.info()["state"] == "ready"


def test_a_failed_load_brings_the_running_model_back(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    assert server.load(NAME, **QUICK_OPTIONS)[0] == 200
    before = server.info()
    status, body = server.load(NAME, attn_implementation="flash_attention_2")
    assert status >= 400, body
    info = server.wait_state("ready", "failed")
    assert info["model_name"] == before["model_name"]
    assert info["options"] == before["options"]


def test_a_server_that_hangs_is_told_of_and_what_happened_meanwhile_is_shown(
    launch: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    server = launch("--no-warm-worker")
    page = open_page(server)
    expect(page.locator("#status")).to_contain_text("No model loaded")
    server.process.send_signal(signal.SIGSTOP)
    try:
        expect(page.locator("#lost")).to_be_visible(timeout=30_000)
    finally:
        server.process.send_signal(signal.SIGCONT)
    expect(page.locator("#lost")).to_be_hidden(timeout=10_000)
