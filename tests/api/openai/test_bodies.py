"""What a body costs that is wrong in very many places."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from modules.api.openai.bodies import MOST_FIELDS, ChatBody, CompletionBody
from modules.api.tokens import TextBody, TokensBody

MANY = 5000
USER = {"role": "user", "content": "x"}
FIELDS: dict[str, Any] = {f"x{number}": {} for number in range(MANY)}


@pytest.mark.parametrize(
    ("cls", "body"),
    [
        (CompletionBody, {"prompt": [{}] * MANY}),
        (CompletionBody, {"prompt": [[{}] * MANY] * MANY}),
        (CompletionBody, {"prompt": [*[1] * MANY, "x"]}),
        (CompletionBody, {"prompt": "x", "logit_bias": FIELDS}),
        (CompletionBody, {"prompt": "x", "metadata": FIELDS}),
        (CompletionBody, {"prompt": "x", "stop": [{}] * MANY}),
        (CompletionBody, {"prompt": "x", **FIELDS}),
        (ChatBody, {"messages": [{}] * MANY}),
        (ChatBody, {"messages": [{**USER, **FIELDS}] * 100}),
        (ChatBody, {"messages": [{**USER, "content": [{}] * MANY}]}),
        (ChatBody, {"messages": [{**USER, "tool_calls": [{}] * MANY}]}),
        (ChatBody, {"messages": [USER], "tools": [{}] * 128}),
        (ChatBody, {"messages": [USER], "modalities": [{}] * MANY}),
        (TokensBody, {"tokens": [{}] * MANY}),
        (TextBody, {"text": "x", **FIELDS}),
    ],
)
def test_a_body_of_many_errors_is_refused_for_a_few(cls: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate(body)
    assert caught.value.error_count() <= 5


def test_a_large_body_that_is_right_is_taken() -> None:
    bias: dict[str, float] = {str(number): 1 for number in range(MOST_FIELDS)}
    assert len(CompletionBody(prompt=[[1] * MANY] * 32, logit_bias=bias).logit_bias or ()) == MOST_FIELDS
    for prompt in ("x", ["x", "y"], [1, 2], [[1], [2]]):
        assert CompletionBody.model_validate({"prompt": prompt}).prompt == prompt
