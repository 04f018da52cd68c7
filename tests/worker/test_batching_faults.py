"""What happens to answers under way where memory runs out, or a model computes no numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import InternalError, OutOfMemory
from modules.protocol import AdapterChoice, GenerateOrder
from modules.worker.batching import scheduler
from modules.worker.batching.slabs import Slab, Slabs
from modules.worker.batching.steps import Steps
from tests.worker.batches import Desk, Told, order, tiny_llama

FULL = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(scope="module")
def _desk(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tiny_llama(), tmp_path_factory.mktemp("desk"), ctx_tokens=512, max_batch=8, batch_tokens=8192)


@pytest.fixture
def desk(_desk: Desk) -> Desk:
    """A tiny model in float32 that has been tried with two at once, and a new scheduler for it."""
    _desk.reset()
    _desk.together([order(0, 3), order(1, 3)])
    return _desk


def texts(told: list[Told]) -> list[str]:
    return [one.text for one in told]


def of_two_sets(tokens: int) -> list[GenerateOrder]:
    """Three orders. No LoRA has to be there: nothing acts on a desk without any."""
    other = (AdapterChoice("other", "/other"),)
    return [order(0, tokens), replace(order(1, tokens), adapters=other), order(2, tokens)]


@contextmanager
def failing(target: type, name: str, calls: set[int], error: Exception) -> Iterator[list[int]]:
    """Some calls of a method that gives layers away one by one raise ``error`` after the first layer."""
    real: Callable[..., Any] = getattr(target, name)
    made: list[int] = []

    def method(self: Any, *args: Any) -> Any:
        made.append(1)
        if len(made) not in calls:
            return real(self, *args)
        for one in args:
            if isinstance(one, Iterator):
                next(one)
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, method)
        yield made
    assert len(made) >= max(calls)


@pytest.fixture(scope="module")
def expected(_desk: Desk) -> list[str]:
    """What each of three says alone."""
    _desk.reset()
    return texts(_desk.alone(of_two_sets(66)))


@pytest.mark.parametrize("calls", [{1}, {2}, {3}, {4}, {1, 2}, {2, 3}], ids=str)
def test_where_memory_is_short_answers_step_back_and_lose_nothing(
    desk: Desk, calls: set[int], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three join, and each of them grows out of its first slab later."""
    orders = of_two_sets(66)
    released: list[int] = []
    monkeypatch.setattr(scheduler, "release", lambda: released.append(desk.scheduler.slots))
    with failing(Slab, "put", calls, FULL):
        told = desk.together(orders)
    assert texts(told) == expected
    assert len(released) == len(calls)
    assert desk.scheduler.slots == 0
    assert desk.steps < 3 * 66 + 20  # one after another, and some prompts again
    desk.together(orders)
    assert desk.steps < 2 * 66 + 20  # all together again: the two sets take turns


@pytest.mark.parametrize(
    ("name", "calls"),
    [("together", {1}), ("together", {3}), ("together", {2, 3}), ("read", {2}), ("read", {3})],
    ids=str,
)
def test_where_a_step_has_too_little_memory_one_answer_waits_and_none_fails(
    desk: Desk, name: str, calls: set[int], expected: list[str]
) -> None:
    orders = of_two_sets(66)
    with failing(Steps, name, calls, FULL):
        told = desk.together(orders)
    assert texts(told) == expected
    assert desk.scheduler.slots == 0


def test_who_is_left_alone_is_read_again_where_there_is_no_memory_to_move(desk: Desk) -> None:
    orders = [order(0, 60), order(1, 20)]
    expected = texts(desk.alone(orders))
    with failing(Slabs, "take_out", {1}, FULL):
        assert texts(desk.together(orders)) == expected
    assert desk.scheduler.slots == 0


def test_a_move_that_fails_for_another_reason_fails_one_answer(desk: Desk) -> None:
    orders = of_two_sets(20)
    expected = texts(desk.alone(orders))
    with failing(Slab, "put", {2}, RuntimeError("odd")):
        told = desk.together(orders)
    assert isinstance(told[1].error, InternalError)
    assert texts([told[0], told[2]]) == [expected[0], expected[2]]


def test_a_failed_prompts_tensors_are_gone_when_memory_is_given_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def read(self: Steps, row: Any, tokens: int) -> None:
        tensor = torch.zeros(9)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def release() -> None:
        gc.collect()
        alive.append(held[0]() is not None)

    monkeypatch.setattr(Steps, "read", read)
    monkeypatch.setattr(scheduler, "release", release)
    told = desk.together([order(0)])
    assert isinstance(told[0].error, OutOfMemory)
    assert alive == [False]


@pytest.mark.parametrize(
    ("options", "value"),
    [({}, torch.nan), ({}, torch.inf), ({"temperature": 1.0, "seed": 3}, torch.nan),
     ({"repetition_penalty": 1.2}, torch.nan)],
)  # fmt: skip
def test_who_gets_scores_that_are_no_numbers_fails_and_leaves_others_alone(
    desk: Desk, options: dict[str, Any], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [order(number, 12, **options) for number in range(3)]
    expected = texts(desk.alone(orders))
    real = Steps.together
    made: list[int] = []

    def together(self: Steps, slabs: list[Slab]) -> Any:
        rows, scores = real(self, slabs)
        made.append(1)
        if len(made) == 5:
            for tensor in (*slabs[0].keys, *slabs[0].values):
                tensor[1] = value  # as a model leaves them whose numbers overflow
            scores[1, 77] = value
        return rows, scores

    monkeypatch.setattr(Steps, "together", together)
    late: list[Told] = []

    def join(told: Told) -> None:
        if len(told.pieces) == 8 and not late:
            late.append(desk.ask(orders[1]))

    told = [desk.ask(one, then=join) for one in orders]
    desk.work()
    assert isinstance(told[1].error, InternalError)
    assert "--bf16" in told[1].error.hint
    assert told[1].error.__traceback__ is None
    assert texts([told[0], told[2]]) == [expected[0], expected[2]]
    assert texts(late) == [expected[1]]  # in the place that the failed one left
