"""The server is told to end while somebody uses it: it ends soon, and says nothing that looks like a fault."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import Server, wait_for
from tests.e2e.test_load_from_the_browser import NAME, ask
from tests.machine import QUICK_FLAGS

ENDS_WITHIN_S = 5
FAULTS = ("Traceback", "ERROR", "Exception")


def assert_ends_quietly(server: Server, end: signal.Signals) -> None:
    server.process.send_signal(end)
    server.process.wait(ENDS_WITHIN_S)
    server.reader.join(ENDS_WITHIN_S)
    output = "".join(server.output)
    assert not any(fault in output for fault in FAULTS), output


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_with_an_open_page(launch: Callable[..., Server], open_page: Callable[..., Page], end: signal.Signals) -> None:
    server = launch("--no-warm-worker")
    open_page(server)
    assert_ends_quietly(server, end)


def test_with_an_answer_on_its_way(launch: Callable[..., Server], open_page: Callable[..., Page]) -> None:
    server = launch("--no-warm-worker", "--model", NAME, *QUICK_FLAGS, "--max-new-tokens", "2000")
    server.wait_state("ready")
    page = open_page(server)
    ask(page, "Write a very long story.")
    expect(page.locator("#chatbot .bot").last).to_contain_text(" ", timeout=30_000)
    assert_ends_quietly(server, signal.SIGTERM)


def test_with_a_program_that_waits_for_a_load(launch: Callable[..., Server]) -> None:
    server = launch("--no-warm-worker")
    answers: list[tuple[int, dict[str, Any]]] = []
    program = threading.Thread(target=lambda: answers.append(server.load(NAME, load_in_4bit=True)))
    program.start()
    wait_for(lambda: server.info()["state"] == "loading", "the load")
    assert_ends_quietly(server, signal.SIGTERM)
    program.join(ENDS_WITHIN_S)
    [(status, body)] = answers
    assert (status, body["error"]["kind"]) == (499, "cancelled")
