"""A reading of files that is followed on the page: how far it is, its outcome, its end before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import pytest

from modules.errors import UserError
from modules.hub.keeping import Reading, Told
from modules.ui.reading import Readings, progress_html
from tests.conftest import wait_until


def tab(name: str) -> gr.Request:
    return gr.Request(session_hash=name)


def reads(going_on: threading.Event) -> Callable[[Told], str]:
    """Tells that it has read 30 of 120 bytes, again and again, until it may go on."""

    def work(told: Told) -> str:
        while not going_on.wait(0.01):
            told(Reading("model.safetensors", 30, 120))
        return "all is well"

    return work


def told(updates: Iterator[list[Any]], text: str) -> list[Any]:
    """The first updates whose line has ``text``."""
    return next(found for found in updates if text in found[0])


def test_how_far_it_is_then_what_came_out() -> None:
    going_on = threading.Event()
    updates = Readings().follow(tab("a"), reads(going_on))
    line, cancel = told(updates, "model.safetensors")
    assert 'aria-valuenow="25"' in line
    assert "30 B of 120 B read" in line
    assert cancel["visible"] is True
    going_on.set()
    line, cancel = told(updates, "all is well")
    assert (line, cancel["visible"]) == ("all is well", "hidden")
    assert not list(updates)


def test_one_tab_ends_its_own_reading_alone() -> None:
    readings, going_on = Readings(), threading.Event()
    mine, others = (readings.follow(tab(name), reads(going_on)) for name in "ab")
    told(mine, "read")
    told(others, "read")
    readings.end(tab("a"))
    told(mine, "Cancelled")
    told(others, "read")
    going_on.set()
    told(others, "all is well")
    readings.end(tab("b"))  # it is over: nothing to end


def test_a_page_that_goes_ends_what_it_reads() -> None:
    readings, ended = Readings(), threading.Event()

    def work(tell: Told) -> str:
        try:
            return reads(threading.Event())(tell)
        finally:
            ended.set()

    updates = readings.follow(tab("a"), work)
    told(updates, "read")
    updates.close()  # type: ignore[attr-defined]
    wait_until(ended.is_set)


def test_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("modules.ui.reading.warn", lambda error: said.append(str(error)))

    def work(_: Told) -> str:
        raise UserError("Nothing is recorded of it.")

    last = list(Readings().follow(tab("a"), work))[-1]
    assert (last[0], last[1]["visible"]) == ("", "hidden")
    assert said == ["Nothing is recorded of it."]


def test_the_time_left_is_told_where_something_is_known() -> None:
    assert "10 s left" in progress_html(Reading("a", 1, 3), 5.0)
    assert "left" not in progress_html(Reading("a", 0, 3), 5.0)
    assert "moving" in progress_html(None, 5.0)
