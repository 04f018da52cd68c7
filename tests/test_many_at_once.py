"""Many askers of a real worker, some of whom leave, while the worker is killed: nobody gets a wrong answer."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from modules.errors import Cancelled, LoadstoneError, NothingLoaded, WorkerCrashed
from modules.protocol import Done, GenerateOrder, Piece, Shape, Waiting
from modules.supervisor import State, Supervisor
from tests import checkpoints
from tests.supervised import Workers, until
from tests.worker.batches import order, tiny_llama

ASKERS, KILLS = 16, 2
BETWEEN = 30  # whole answers, at least, between one thing and the next
LOAD_S = 120.0
_FLAT_BYTES = 48 * 2**20


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def supervisor(demo_model: Path, tmp_path: Path) -> Iterator[Supervisor]:
    """With a tiny model in float32 that answers eight at a time, within the room of three long ones."""
    supervisor = Supervisor(warm_worker=False)  # so that the one worker it has is the one with the model
    supervisor.load(
        checkpoints.order_for(tiny_llama(), tmp_path, cpu=True, ctx_tokens=256, max_batch=8, batch_tokens=768)
    )
    assert supervisor.wait_loaded(LOAD_S).state is State.READY
    yield supervisor
    supervisor.close()


def orders() -> list[GenerateOrder]:
    """Different prompts, lengths, samplings, stops and penalties."""
    return [
        order(
            number, 10 + 9 * (number % 9), temperature=(0.0, 0.9)[number % 2], seed=number,
            shape=Shape(stops=("a",) if number % 5 == 0 else (), presence_penalty=float(number % 3)),
        )
        for number in range(12)
    ]  # fmt: skip


@dataclass
class Ended:
    """How the answers ended, and what was wrong."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    whole: int = 0
    left: int = 0
    errors: list[LoadstoneError] = field(default_factory=list)
    waited: int = 0
    wrong: list[str] = field(default_factory=list)

    def more(self, count: int) -> None:
        """Wait for so many more whole answers."""
        begun = self.whole
        until(lambda: self.whole >= begun + count or self.wrong, f"{count} answers", 60)


def ask(supervisor: Supervisor, expected: dict[int, str], chance: random.Random, ended: Ended) -> None:
    """Ask for one of the answers, and sometimes leave before it is there."""
    number, leaves = chance.randrange(12), chance.random() < 0.15
    text, done = "", None
    try:
        with supervisor.generate(orders()[number]) as answer:
            for chunk in answer:
                text += chunk.text if isinstance(chunk, Piece) else ""
                done = chunk if isinstance(chunk, Done) else None
                ended.waited += isinstance(chunk, Waiting)
                if leaves and text:
                    break
    except LoadstoneError as error:
        with ended.lock:
            ended.errors.append(error)
        if isinstance(error, NothingLoaded):
            until(lambda: supervisor.snapshot().loaded is not None, "the model again", LOAD_S)
    with ended.lock:
        ended.whole += done is not None
        ended.left += done is None and leaves and bool(text)
        right = text == expected[number] if done else expected[number].startswith(text)
        if not right:
            ended.wrong.append(f"{number}: {text!r} for {expected[number]!r}")


def holder(workers: Workers) -> psutil.Process:
    """The worker with the model: there is no other."""
    (found,) = workers()
    return found


def test_random_load_with_workers_killed(workers: Workers, supervisor: Supervisor) -> None:
    chance = random.Random(11)
    expected = {
        number: "".join(chunk.text for chunk in supervisor.generate(one) if isinstance(chunk, Piece))
        for number, one in enumerate(orders())
    }
    ended = Ended()

    stop = threading.Event()

    def asker(seed: int) -> None:
        own = random.Random(seed)
        while not stop.is_set():
            ask(supervisor, expected, own, ended)

    threads = [threading.Thread(target=asker, args=(seed,)) for seed in range(ASKERS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(KILLS):
            ended.more(BETWEEN + chance.randrange(20))
            holder(workers).kill()
            until(lambda: supervisor.snapshot().loaded is None, "that the end is noticed")
            supervisor.reload()
            assert supervisor.wait_loaded(LOAD_S).state is State.READY
        ended.more(BETWEEN)
        before = holder(workers).memory_info().rss
        ended.more(2 * BETWEEN)
        assert holder(workers).memory_info().rss < before + _FLAT_BYTES
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert ended.wrong == []
    assert ended.left
    assert ended.waited
    assert {type(error) for error in ended.errors} <= {NothingLoaded, Cancelled, *_crashes(ended.errors)}
    assert any(isinstance(error, WorkerCrashed) for error in ended.errors)


def _crashes(errors: list[LoadstoneError]) -> set[type[LoadstoneError]]:
    return {type(error) for error in errors if isinstance(error, WorkerCrashed)}
