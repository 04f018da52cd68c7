"""An answer that is stopped: before it begins, while its prompt is read, while it comes; and one that is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from modules.errors import LoadstoneError, NothingLoaded, OutOfMemory
from modules.protocol import Chunk, Done, Piece
from modules.service.stopping import Stop, chunks
from tests.supervised import LIMIT_S, Supervised, prompt, supervised, text_of


@pytest.fixture(scope="module")
def loaded() -> Iterator[Supervised]:
    with supervised() as one:
        one.load("good")
        yield one


def answer_in_a_thread(loaded: Supervised, text: str, stop: Stop, got: list[Chunk]) -> threading.Thread:
    thread = threading.Thread(target=lambda: got.extend(chunks(loaded.supervisor, prompt(text), stop)))
    thread.start()
    return thread


@pytest.mark.parametrize("text", ["mute", "hang", "forever"])
def test_a_stop_ends_it_at_once_wherever_it_is(loaded: Supervised, text: str) -> None:
    stop, got = Stop(), list[Chunk]()
    thread = answer_in_a_thread(loaded, text, stop, got)
    loaded.when(lambda s: s.generating == 1)
    if text != "mute":
        while not got:
            time.sleep(0.01)
    began = time.monotonic()
    stop.set()
    stop.set()
    assert time.monotonic() - began < 1  # it waits for nobody
    thread.join(LIMIT_S)
    *pieces, done = got
    tokens = sum(isinstance(piece, Piece) for piece in pieces)
    assert done == Done("cancelled", 0, tokens, 0.0, 0.0)
    loaded.when(lambda s: s.generating == 0)


def test_one_that_is_stopped_before_never_begins(loaded: Supervised) -> None:
    stop = Stop()
    stop.set()
    assert list(chunks(loaded.supervisor, prompt("2"), stop)) == [Done("cancelled", 0, 0, 0.0, 0.0)]


def test_one_stop_ends_several(loaded: Supervised) -> None:
    stop, others = Stop(), [list[Chunk]() for _ in range(4)]
    threads = [answer_in_a_thread(loaded, "forever", stop, got) for got in others]
    loaded.when(lambda s: s.generating == 4)
    stop.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert {got[-1].finish_reason for got in others if isinstance(got[-1], Done)} == {"cancelled"}


def test_one_that_is_not_stopped_ends_by_itself_and_is_forgotten(loaded: Supervised) -> None:
    stop = Stop()
    *pieces, done = chunks(loaded.supervisor, prompt("3"), stop)
    assert (text_of(iter(pieces)), done) == ("1 2 3 ", Done("stop", 10, 3, 0.1, 3 / 50))
    assert not stop._answers
    stop.set()


def test_whoever_leaves_the_loop_ends_it(loaded: Supervised) -> None:
    answer = chunks(loaded.supervisor, prompt("forever"), Stop())
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert loaded.supervisor.snapshot().generating == 0


def test_what_it_failed_with_is_raised(loaded: Supervised) -> None:
    with pytest.raises(OutOfMemory):
        list(chunks(loaded.supervisor, prompt("fail"), Stop()))
    with pytest.raises(LoadstoneError, match="broke the connection"):
        list(chunks(loaded.supervisor, prompt("cut"), Stop()))
    with supervised() as empty, pytest.raises(NothingLoaded):
        list(chunks(empty.supervisor, prompt("2"), Stop()))
