"""What a body costs that is wrong in very many places, and what clients send beside what is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from modules.api.openai.bodies import MOST_FIELDS, MOST_PARTS, ChatBody, CompletionBody, EmbeddingBody, Message
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


CALL = {"id": None, "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}
PART = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({**USER, "id": 1, "opts": {}, "provider_specific_fields": {"refusal": None}}, "x"),
        ({**USER, "thinking_blocks": None, "reasoning": "so", "metadata": {"a": 1}}, "x"),
        ({"role": "user", "content": [PART, PART]}, "xx"),
        ({"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0, "more": 1}]}, ""),
        ({"role": "assistant", "content": None, "refusal": "No.", "annotations": [{}], "parsed": {}}, "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
    ],
)
def test_what_a_client_notes_in_its_messages_is_taken(message: dict[str, Any], text: str) -> None:
    body = ChatBody.model_validate({"messages": [message]})
    assert body.messages[0].text == text


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "audio": {"id": "x"}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    ],
)
def test_what_a_message_says_in_other_ways_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Message.model_validate(message)


@pytest.mark.parametrize(
    "more",
    [
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": {"include_usage": None}},
        {"prompt_cache_retention": "24h"},
        {"top_k": -1},
        *({name: None} for name in ("audio", "prediction", "verbosity", "functions", "web_search_options", "top_k")),
    ],
)
def test_what_changes_nothing_is_taken(more: dict[str, Any]) -> None:
    assert ChatBody.model_validate({"messages": [USER], **more}).messages[0].text == "x"


@pytest.mark.parametrize("more", [{"audio": {}}, {"verbosity": "low"}, {"functions": []}, {"top_k": -2}])
def test_what_asks_for_something_else_is_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": [USER], **more})
    assert caught.value.errors()[0]["loc"] == tuple(more)


@pytest.mark.parametrize("held", [{"content": [PART] * 11}, {"tool_calls": [CALL] * 11}])
def test_parts_have_a_bound_for_all_messages_together(held: dict[str, Any]) -> None:
    many = [{"role": "assistant", **held}] * (MOST_PARTS // 11)
    assert len(ChatBody.model_validate({"messages": many}).messages) == len(many)
    with pytest.raises(ValidationError, match="parts of messages are too many") as caught:
        ChatBody.model_validate({"messages": [*many, *many[:1]]})
    assert caught.value.errors()[0]["loc"] == ("messages",)


@pytest.mark.parametrize(
    ("cls", "body", "field"),
    [
        (CompletionBody, {"prompt": "a\ud800"}, "prompt"),
        (CompletionBody, {"prompt": ["a", "\udc00"]}, "prompt"),
        (CompletionBody, {"prompt": "a", "stop": "\ud800"}, "stop"),
        (ChatBody, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "messages"),
        (EmbeddingBody, {"input": "\ud800"}, "input"),
    ],
)
def test_half_a_character_is_refused_by_its_field(cls: type[BaseModel], body: dict[str, Any], field: str) -> None:
    """JSON can write it, and no tokenizer takes it."""
    with pytest.raises(ValidationError, match="unicode") as refused:
        cls.model_validate(body)
    assert {one["loc"][0] for one in refused.value.errors()} == {field}
