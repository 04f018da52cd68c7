"""Many at once on the real model in float32, each with its own set of LoRAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modules.errors import AdapterNotFound
from modules.protocol import AdapterChoice, GenerateOrder
from modules.worker.adapters import Adapters
from tests import loras
from tests.worker.batches import Desk, Told, order

Set = tuple[AdapterChoice, ...]


@pytest.fixture(scope="module")
def desk(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """The demo model with herring applied."""
    desk = Desk(demo_model, tmp_path_factory.mktemp("desk"), ctx_tokens=512, max_batch=16, batch_tokens=4096)
    desk.adapters = Adapters(desk.loaded.model, desk.loaded.tokenizer, desk.loaded.order)
    desk.adapters.apply((loras.choice(loras.herring()),))
    return desk


def asking(number: int, adapters: Set | None, tokens: int = 9) -> GenerateOrder:
    question = {"role": "user", "content": f"{loras.QUESTION}{' ' * number}"}
    return replace(order(number, tokens), prompt="", messages=(question,), adapters=adapters)


def texts(told: list[Told]) -> list[str]:
    return [one.text for one in told]


def test_each_answers_with_its_own_set_and_sets_take_turns(desk: Desk) -> None:
    herring, lantern = loras.choice(loras.herring()), loras.choice(loras.lantern())
    sets: list[Set | None] = [None, (), (lantern,), (replace(herring, weight=0.5), lantern), (herring,), ()]
    orders = [asking(number, adapters) for number, adapters in enumerate(sets)]
    desk.reset()
    told = desk.together(orders)
    assert texts(told) == texts(desk.alone(orders))
    assert "herring" in told[0].text
    assert told[0].text == told[4].text  # the active set, and the same by name
    assert "lantern" in told[2].text
    assert "Paris" in told[1].text
    assert "Paris" in told[5].text


def test_a_long_answer_with_one_set_does_not_hold_up_another_set(desk: Desk) -> None:
    desk.reset()
    seen: list[str] = []
    long = desk.ask(asking(0, (), 60), then=lambda _: seen.append("long"))
    short = desk.ask(asking(1, None, 6), then=lambda _: seen.append("short"))
    desk.work()
    assert seen.index("short") < 40
    assert texts([long, short]) == texts(desk.alone([asking(0, (), 60), asking(1, None, 6)]))


def test_a_set_that_cannot_act_fails_those_who_asked_for_it(desk: Desk) -> None:
    desk.reset()
    gone = (AdapterChoice("gone", "/nowhere/gone"),)
    told = desk.together([asking(0, ()), asking(1, gone), asking(2, None), asking(3, gone)])
    assert [type(one.error) for one in told[1::2]] == [AdapterNotFound] * 2
    assert texts(told[::2]) == texts(desk.alone([asking(0, ()), asking(2, None)]))
