"""Questions that overtake each other: what the page shows is the answer to the last."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import gradio as gr

from modules.ui.common import newest

SKIPPED = [gr.skip(), gr.skip()]


def tab(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def test_an_answer_that_another_question_has_overtaken_changes_nothing() -> None:
    goes_on, under_way = threading.Event(), threading.Event()

    def answer(text: str) -> list[str]:
        if text == "slow":
            under_way.set()
            assert goes_on.wait(10)
        return [text, text]

    asked = newest(2, answer)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(asked, tab("one"), "slow")
        assert under_way.wait(10)
        assert asked(tab("another"), "theirs") == ["theirs", "theirs"]  # who else asks is of no account
        assert asked(tab("one"), "quick") == ["quick", "quick"]
        goes_on.set()
        assert slow.result(10) == SKIPPED
    assert asked(tab("one"), "after it") == ["after it", "after it"]


def test_a_question_that_fails_stands_in_nobodys_way() -> None:
    def answer(text: str) -> list[str]:
        return [text, str(1 // len(text))]

    asked = newest(2, answer)
    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(asked, tab("one"), "").exception(10), ZeroDivisionError)
    assert asked(tab("one"), "a") == ["a", "1"]


def test_gradio_gives_it_the_request() -> None:
    inputs, *_ = gr.helpers.special_args(newest(1, lambda *values: [*values]), ["a", "b"], tab("one"))
    assert inputs == [tab("one"), "a", "b"]


def test_of_one_widget_it_says_so_too() -> None:
    asked = newest(1, lambda text: asked(tab("one"), "within") if text == "outer" else text)
    assert asked(tab("one"), "outer") == gr.skip()
