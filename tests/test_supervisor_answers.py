"""Answers from a worker: several at once, stopped, broken off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from modules.errors import Cancelled, LoadstoneError, OutOfMemory, RequestTooLong
from modules.protocol import MEMORY, Failed, Piece
from modules.supervisor import State
from tests.supervised import LIMIT_S, Supervised, prompt, supervised, text_of, until


@pytest.fixture
def cold() -> Iterator[Supervised]:
    with supervised() as one:
        yield one


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
    until(lambda: len(chunks) == (text == "hang"), "what it says before it says no more")
    began = time.monotonic()
    answer.close()
    reader.join(LIMIT_S)
    assert time.monotonic() - began < 2
    assert len(chunks) == (text == "hang")  # none came after
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


def test_commands_to_a_worker_that_has_gone_say_why_it_went(cold: Supervised) -> None:
    """Connections that were kept to it are closed then, and none of them is taken."""
    cold.load("good")
    list(cold.supervisor.generate(prompt("2")))
    child = cold.supervisor._owner.child
    assert child is not None
    assert child._kept
    answer = cold.supervisor.generate(prompt("2"))
    cold.supervisor.unload()
    with pytest.raises(Cancelled, match="unloaded"):
        next(answer)
    with pytest.raises(Cancelled, match="unloaded"):
        child.call("GET", MEMORY, timeout_s=2)
