"""Many answers at once say what each of them says alone."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import InternalError, OptionError, RequestTooLong
from modules.protocol import Done, GenerateOrder, Piece, Shape, Waiting
from modules.worker.batching import scheduler
from modules.worker.batching.choosing import drawn, key_of
from modules.worker.generation import Answer, generate
from tests import checkpoints
from tests.worker.batches import Desk, Told, at_call, order, tiny_llama


@pytest.fixture(scope="module")
def _desk(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tiny_llama(), tmp_path_factory.mktemp("desk"), ctx_tokens=1024, max_batch=64, batch_tokens=16384)


@pytest.fixture
def desk(_desk: Desk) -> Desk:
    """A tiny model in float32, and a new scheduler for it."""
    _desk.reset()
    return _desk


def texts(told: list[Told]) -> list[str]:
    return [one.text for one in told]


def by_transformers(desk: Desk, orders: list[GenerateOrder]) -> list[str]:
    """What ``model.generate`` answers to each alone."""
    answers = []
    for one in orders:
        told = Told()
        generate(desk.loaded, one, told.chunks.append)
        answers.append(told.text)
    return answers


@pytest.mark.parametrize("count", [16, 64])
def test_greedy_answers_are_those_of_generate_token_for_token(desk: Desk, count: int) -> None:
    orders = [order(number, 8 + number % 9) for number in range(count)]
    told = desk.together(orders)
    assert desk.steps <= count + 16 + 8  # a prompt each, the longest answer, the trial: all went together
    assert texts(told) == by_transformers(desk, orders)
    assert [one.done.completion_tokens for one in told] == [8 + number % 9 for number in range(count)]
    assert len({one.text for one in told}) > count // 2


def varied(number: int) -> GenerateOrder:
    """Sampling, seed, penalties and stop of its own."""
    shape = Shape(stops=("e",) if number % 5 == 4 else (), frequency_penalty=0.5 * (number % 2))
    return order(
        number, 9 + number % 7, shape=shape, temperature=0.5 + 0.1 * (number % 8), seed=number,
        top_p=(1.0, 0.9, 0.5)[number % 3], top_k=(0, 40)[number % 2], min_p=(0.0, 0.05)[number % 4 == 3],
        repetition_penalty=(1.0, 1.2)[number % 6 == 5],
    )  # fmt: skip


@pytest.mark.parametrize("count", [16, 64])
def test_each_keeps_its_own_sampling_seed_and_stop(desk: Desk, count: int) -> None:
    orders = [varied(number) for number in range(count)]
    together = desk.together(orders)
    alone = desk.alone(orders)
    assert texts(together) == texts(alone)
    stopped = [one for number, one in enumerate(together) if number % 5 == 4]
    assert any(one.done.finish_reason == "stop" for one in stopped)
    assert all("e" not in one.text for one in stopped)


def test_the_same_seed_gives_the_same_answer_and_none_a_new_one(desk: Desk) -> None:
    same = order(0, temperature=1.0, seed=7)
    free = order(0, temperature=1.0)
    first, second, other, one, two = texts(
        desk.together([same, same, order(0, temperature=1.0, seed=8), free, free])
    )  # fmt: skip
    assert first == second != other
    assert one != two


def test_a_draw_follows_the_probabilities_that_transformers_gives(desk: Desk) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    options = order(0, temperature=1.5, top_p=0.95, top_k=60, min_p=0.03).options
    warped = (scores / 1.5)[None]
    for warper in (TopKLogitsWarper(60), TopPLogitsWarper(0.95), MinPLogitsWarper(0.03)):
        warped = warper(None, warped)
    expected = warped[0].softmax(0)
    draws = torch.tensor([drawn(scores, options, key_of(seed, seed % 7)) for seed in range(5000)])
    counts = torch.bincount(draws, minlength=1000)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((counts / 5000 - expected).abs().sum()) / 2 < 0.06


def test_who_comes_late_joins_and_changes_nobodys_answer(desk: Desk) -> None:
    late: list[Told] = []

    def join(told: Told) -> None:
        if len(told.pieces) in (4, 9, 14) and len(late) < len(told.pieces) // 4:
            late.append(desk.ask(order(len(late) + 1, 30)))

    first = desk.ask(order(0, 40), then=join)
    desk.work()
    assert len(late) == 3
    assert desk.steps < 40 + 30  # together: one after another would take 130
    assert texts([first, *late]) == by_transformers(desk, [order(0, 40), *(order(n, 30) for n in (1, 2, 3))])


def test_who_goes_leaves_at_the_next_step_and_changes_nobodys_answer(desk: Desk) -> None:
    stopped = threading.Event()
    counts: list[int] = []

    def leave(told: Told) -> None:
        if isinstance(told.chunks[-1], Piece) and told.chunks[-1].tokens == 5:
            stopped.set()

    gone = desk.ask(order(0, 500), then=leave, stopped=stopped)
    others = [desk.ask(order(number, 20), then=lambda told: counts.append(len(told.chunks))) for number in range(1, 6)]
    desk.work()
    assert gone.done.finish_reason == "cancelled"
    assert gone.done.completion_tokens == 5
    assert texts(others) == by_transformers(desk, [order(number, 20) for number in range(1, 6)])


def test_who_gave_up_in_the_line_costs_no_step(desk: Desk) -> None:
    stopped = threading.Event()
    stopped.set()
    told = desk.ask(order(0), stopped=stopped)
    desk.work()
    assert desk.steps == 0
    assert told.done.finish_reason == "cancelled"


def test_who_leaves_while_the_prompt_is_prepared_does_no_harm(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    first, leaves, last = (desk.ask(order(number, 12)) for number in range(3))
    tickets, made = [*desk.line._waiting], list[Answer]()

    def prepared(loaded: Any, asked: Any, *rest: Any) -> Answer:
        made.append(Answer(loaded, asked, *rest))
        if len(made) == 2:  # by then the first one is under way
            desk.line.leave(tickets[1])  # as the event loop does on a thread of its own
        return made[-1]

    monkeypatch.setattr(scheduler, "Answer", prepared)
    desk.work()
    assert texts([first, last]) == by_transformers(desk, [order(0, 12), order(2, 12)])
    assert not leaves.pieces


def test_forms_penalties_and_log_probabilities_are_each_answers_own(desk: Desk) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shapes = [
        Shape(json_schema=schema), Shape(presence_penalty=1.5, frequency_penalty=1.0),
        Shape(logit_bias={"260": 100.0}), Shape(logprobs=3), Shape(), Shape(json_schema=schema, logprobs=1),
    ]  # fmt: skip
    orders = [order(number, 12, shape=shape) for number, shape in enumerate(shapes)]
    together, alone = desk.together(orders), desk.alone(orders)
    assert texts(together) == texts(alone)
    assert together[0].text.startswith('{"a":')
    assert set(desk.loaded.tokenizer(together[2].text, add_special_tokens=False).input_ids) == {260}
    for index in (3, 5):
        told, expected = (
            [entry for piece in one[index].pieces for entry in piece.logprobs] for one in (together, alone)
        )
        assert [entry["token"] for entry in told] == [entry["token"] for entry in expected]
        values = [entry["logprob"] for entry in expected]
        assert [entry["logprob"] for entry in told] == pytest.approx(values, abs=1e-4)
    if together[0].done.finish_reason == "stop":
        json.loads(together[0].text)


def test_an_order_that_fails_fails_alone(desk: Desk) -> None:
    good = [order(number, 20) for number in range(4)]
    long = dataclasses.replace(good[0], prompt="word " * 2000, whole=True)
    bad = [
        order(7, shape=Shape(json_schema={"type": "no such type"})),  # before it begins
        order(8, shape=Shape(logit_bias={"99999": 1.0})),  # at its first token
        long,
    ]
    told = desk.together([good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3]])
    assert texts(told[::2]) == by_transformers(desk, good)
    assert [type(one.error) for one in told[1::2]] == [OptionError, OptionError, RequestTooLong]


def test_a_step_that_fails_fails_those_in_it_and_leaves_the_model_usable(desk: Desk) -> None:
    orders = [order(number, 20) for number in range(3)]
    expected = by_transformers(desk, orders)
    assert texts(desk.together(orders)) == expected  # the trial of two at once is over
    with at_call(desk, 8, RuntimeError("odd")):
        told = desk.together(orders)
    assert [type(one.error) for one in told] == [InternalError] * 3
    assert all(one.error.__traceback__ is None for one in told)
    assert desk.scheduler.slots == 0
    assert texts(desk.together(orders)) == expected


def test_a_step_without_memory_for_all_leaves_all_their_answers(desk: Desk) -> None:
    """All layers have written the new token's keys when it fails; the step is made again without the youngest."""
    orders = [order(number, 20) for number in range(3)]
    expected = by_transformers(desk, orders)
    desk.together(orders)
    with at_call(desk, 8, torch.OutOfMemoryError("CUDA out of memory.")):
        assert texts(desk.together(orders)) == expected
    assert desk.scheduler.slots == 0


def test_a_prompt_that_fails_fails_alone(desk: Desk) -> None:
    orders = [order(number, 20) for number in range(3)]
    desk.together(orders)
    with at_call(desk, 2, RuntimeError("odd")):
        told = desk.together(orders)
    assert isinstance(told[1].error, InternalError)
    assert texts([told[0], told[2]]) == by_transformers(desk, [orders[0], orders[2]])


def test_memory_stays_within_the_bound_and_who_steps_back_loses_nothing(demo_model: Path, tmp_path: Path) -> None:
    desk = Desk(tiny_llama(), tmp_path, ctx_tokens=192, max_batch=16, batch_tokens=448)
    held: list[int] = []
    desk.loaded.model.register_forward_hook(lambda *_: held.append(desk.scheduler.slots))
    orders = [order(number, 100, temperature=0.8, seed=number) for number in range(6)]
    told = desk.together(orders)
    assert desk.steps < 6 * 100 / 1.5
    assert 192 < max(held) <= 448
    assert held.count(0) < len(held) / 2
    assert texts(told) == texts(desk.alone(orders))
    assert all(one.done.completion_tokens == 100 for one in told)


def test_no_more_than_may_be_are_under_way_and_the_others_are_told_their_place(
    demo_model: Path, tmp_path: Path
) -> None:
    desk = Desk(tiny_llama(), tmp_path, max_batch=2, batch_tokens=2048)
    told = desk.together([order(number, 10) for number in range(5)])
    places = [[chunk.place for chunk in one.chunks if isinstance(chunk, Waiting)] for one in told]
    assert places == [[], [], [1], [2], [3, 1]]
    assert all(isinstance(one.done, Done) for one in told)


@pytest.mark.parametrize("make", [checkpoints.gpt2, checkpoints.gemma3, checkpoints.t5])
def test_other_models_answer_as_alone_together_or_one_after_another(make: Any, tmp_path: Path) -> None:
    task = "seq2seq" if make is checkpoints.t5 else "causal"
    desk = Desk(make(), tmp_path, ctx_tokens=128, task=task)
    assert bool(desk.scheduler.obstacle) == (make is checkpoints.t5)
    orders = [order(number, 10) for number in range(3)]
    assert texts(desk.together(orders)) == by_transformers(desk, orders)


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_quantized_models_answer_as_alone_together_or_one_after_another(
    how: dict[str, Any], demo_model: Path, tmp_path: Path
) -> None:
    desk = Desk(demo_model, tmp_path, ctx_tokens=128, bf16=True, **how)
    orders = [order(number, 10) for number in range(3)]
    assert texts(desk.together(orders)) == by_transformers(desk, orders)
