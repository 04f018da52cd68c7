"""What becomes of a request's body: orders for the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.api.openai.bodies import ChatBody, CompletionBody
from modules.api.openai.orders import chat_orders, completion_orders
from modules.api.openai.reaching import Target
from tests.api.openai.test_reaching import application
from tests.supervised import LIMIT_S


@pytest.mark.parametrize(("seed", "meant"), [(-1, [-1, -1]), (7, [7, 8]), (-2, [2**63 - 3, 2**63 - 2])])
def test_a_seed_of_minus_one_is_a_new_one_each_time(tmp_path: Path, seed: int, meant: list[int]) -> None:
    service, _ = application(tmp_path)
    try:
        service.load("good").wait_loaded(LIMIT_S)
        with service.fleet.need() as use:
            target = Target(use, None)
            body = CompletionBody(prompt="x", n=2, seed=seed)
            assert [order.options.seed for order in completion_orders(service, body, target)] == meant
            chat = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "seed": seed, "top_k": -1})
            (order,) = chat_orders(service, chat, target)
            assert (order.options.seed, order.options.top_k) == (meant[0], 0)
    finally:
        service.close()
