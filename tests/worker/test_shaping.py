"""Penalties as OpenAI defines them, biases and log probabilities, on scores that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.errors import OptionError
from modules.protocol import Shape
from modules.worker.decoding import TextStream
from modules.worker.shaping import Shaping
from modules.worker.tools import TAGGED

SCORES = [1.0, 2.0, 3.0, 4.0]


class Letters:
    """A tokenizer of single letters."""

    is_fast = True

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("abcd"[token] for token in ids)


def shaping(repetition_penalty: float = 1.0, **shape: Any) -> Shaping:
    end = frozenset({3})
    texts = TextStream(Letters()).texts
    return Shaping(Shape(**shape), Letters(), end, None, lambda: False, texts, repetition_penalty)


def after(one: Shaping, tokens: list[int]) -> list[float]:
    """The scores that the next step gets after these tokens of answer."""
    for token in tokens:
        one(torch.tensor([[0]]), torch.tensor([SCORES]))
        one.chosen(token)
    changed: list[float] = one(torch.tensor([[0, *tokens]]), torch.tensor([SCORES]))[0].tolist()
    return changed


def test_penalties_count_what_the_answer_holds_and_not_the_prompt() -> None:
    one = shaping(presence_penalty=0.5, frequency_penalty=0.25)
    assert after(one, []) == SCORES
    assert after(shaping(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 2]) == [1.0, 1.0, 2.25, 4.0]
    assert after(shaping(frequency_penalty=-1.0), [1, 1]) == [1.0, 4.0, 3.0, 4.0]


def test_a_bias_is_added_and_an_unknown_token_is_refused() -> None:
    assert after(shaping(logit_bias={"0": 5.0, "3": -100.0}), []) == [6.0, 2.0, 3.0, -96.0]
    with pytest.raises(OptionError, match="no token 4; its last is 3"):
        after(shaping(logit_bias={"4": 1.0}), [])


def test_log_probabilities_are_the_models_own() -> None:
    one = shaping(logprobs=2, logit_bias={"0": 50.0}, repetition_penalty=2.0)
    assert after(one, [])[0] == 50.5  # 1 / 2, and the bias
    told = one.chosen(0)
    expected = torch.log_softmax(torch.tensor(SCORES), 0).tolist()
    assert told is not None
    assert (told["token"], told["logprob"]) == ("a", pytest.approx(expected[0]))
    assert [top["token"] for top in told["top"]] == ["d", "c"]
    assert [top["logprob"] for top in told["top"]] == pytest.approx([expected[3], expected[2]])
    one(torch.tensor([[0]]), torch.tensor([SCORES]))
    assert one.chosen(3) is None  # the end of the turn is no part of the text


def test_a_schema_that_cannot_be_used_is_told_by_the_parameter_that_brought_it() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/nowhere"}}}
    tools = ({"type": "function", "function": {"name": "f", "parameters": schema}},)
    for shape, words in (
        (Shape(json_schema=schema), "response_format: the schema"),
        (Shape(tools=tools, tool_choice="required"), "tools: the schema"),
    ):
        with pytest.raises(OptionError, match=f"{words} cannot be used: .*nowhere"):
            Shaping(shape, Letters(), frozenset({3}), TAGGED, lambda: False, TextStream(Letters()).texts)
