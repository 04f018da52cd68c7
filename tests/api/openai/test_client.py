"""OpenAI's official client against the real server: chat, completions, streams, and all that shapes an answer."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.api.openai.conftest import MODEL
from tests.conftest import wait_until
from tests.loras import ANSWERS

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.object) for model in listed] == [(MODEL, "model")]
    assert client.models.retrieve(MODEL).to_dict()["loaded"] is True
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/knows")
    assert caught.value.code == "model_not_found"


def test_a_chat_with_its_tokens_counted(client: OpenAI, internal: httpx.Client) -> None:
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    choice, usage = answer.choices[0], answer.usage
    assert (answer.model, choice.finish_reason, choice.message.role) == (MODEL, "stop", "assistant")
    assert "Paris" in (choice.message.content or "")
    assert usage is not None
    prompt = internal.post("/v1/internal/encode", json={"text": PROMPT}).json()
    said = internal.post("/v1/internal/token-count", json={"text": choice.message.content}).json()
    assert usage.prompt_tokens == prompt["length"] == len(prompt["tokens"])
    assert usage.completion_tokens == said["length"] + 1  # and the end of the turn
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    back = internal.post("/v1/internal/decode", json={"tokens": prompt["tokens"]}).json()
    assert back == {"text": PROMPT}


def test_a_stream_is_the_same_answer_in_parts(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    with_usage = {"include_usage": True}
    events = list(client.chat.completions.create(messages=QUESTION, stream=True, stream_options=with_usage, **GREEDY))  # type: ignore[call-overload]
    *parts, last = events
    assert len({event.id for event in events}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len(parts) > 3


def test_completions_by_text_and_by_tokens(client: OpenAI, internal: httpx.Client) -> None:
    text = "The capital of France is"
    tokens = internal.post("/v1/internal/encode", json={"text": text}).json()["tokens"]
    first, second, third = (
        client.completions.create(prompt=prompt, echo=echo, **GREEDY)
        for prompt, echo in ((text, False), (tokens, True), ([text, text], False))
    )
    assert first.choices[0].text.startswith(" Paris")
    assert second.choices[0].text == text + first.choices[0].text
    assert [choice.text for choice in third.choices] == [first.choices[0].text] * 2
    assert first.usage is not None
    assert third.usage is not None
    assert third.usage.prompt_tokens == 2 * first.usage.prompt_tokens
    streamed = client.completions.create(prompt=text, stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in streamed) == first.choices[0].text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_lengths(client: OpenAI, name: str) -> None:
    limits: dict[str, Any] = {name: 3}
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **limits)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_a_stop_ends_the_answer_and_is_not_in_it(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, stop=["never", " Paris"], **GREEDY)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The capital of France is", "stop")


def test_several_choices_come_again_with_the_seed(client: OpenAI) -> None:
    sampled: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "n": 3, "max_tokens": 4, "temperature": 1.5}
    first, again, other = (client.chat.completions.create(seed=seed, **sampled) for seed in (5, 5, 99))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in again.choices] == texts
    assert [choice.message.content for choice in other.choices] != texts
    assert first.usage is not None
    assert first.usage.completion_tokens <= 12


def test_log_probabilities(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content
    assert "".join(one.token for one in told.content) == answer.choices[0].message.content
    for one in told.content:
        assert one.bytes == list(one.token.encode())
        assert [top.logprob for top in one.top_logprobs] == sorted((t.logprob for t in one.top_logprobs), reverse=True)
        assert one.top_logprobs[0].token == one.token  # greedy
        assert one.logprob == one.top_logprobs[0].logprob <= 0
    old = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    assert old.logprobs is not None
    assert old.logprobs.tokens == [one.token for one in told.content]
    assert old.logprobs.token_logprobs == pytest.approx([one.logprob for one in told.content], abs=1e-3)
    assert old.logprobs.text_offset is not None
    assert [old.text[at:][:1] for at in old.logprobs.text_offset] == [one.token[:1] for one in told.content]


def test_a_bias_forbids_and_forces(client: OpenAI, internal: httpx.Client) -> None:
    [paris] = internal.post("/v1/internal/encode", json={"text": " Paris"}).json()["tokens"]
    forbidden = client.chat.completions.create(messages=QUESTION, logit_bias={str(paris): -100}, **GREEDY)
    assert "Paris" not in (forbidden.choices[0].message.content or "")
    forced = client.chat.completions.create(messages=QUESTION, logit_bias={str(paris): 100}, **GREEDY)
    assert forced.choices[0].message.content == " Paris" * 12


def test_a_frequency_penalty_ends_a_repetition(client: OpenAI, internal: httpx.Client) -> None:
    [paris] = internal.post("/v1/internal/encode", json={"text": " Paris"}).json()["tokens"]
    bias = {str(paris): 20}
    plain, penalized = (
        client.completions.create(prompt="I like", logit_bias=bias, frequency_penalty=penalty, **GREEDY).choices[0].text
        for penalty in (0, 2)
    )
    assert plain == " Paris" * 12
    assert 1 <= penalized.count("Paris") < 12


def test_text_in_the_form_of_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    sampled: dict[str, Any] = {"model": MODEL, "temperature": 1.5, "max_tokens": 80, "messages": QUESTION}
    answer = client.chat.completions.create(response_format=form, seed=1, **sampled)
    value = json.loads(answer.choices[0].message.content or "")
    assert (set(value), value["size"] in ("small", "large")) == ({"city", "size"}, True)
    assert answer.choices[0].finish_reason == "stop"
    free = client.chat.completions.create(
        response_format={"type": "json_object"}, seed=3, **{**sampled, "max_tokens": 5}
    )
    assert (free.choices[0].message.content or "").startswith("{")


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_that_must_be_called_is_called(client: OpenAI) -> None:
    asked: dict[str, Any] = {"messages": QUESTION, "tools": [WEATHER], **GREEDY, "max_tokens": 60}
    answer = client.chat.completions.create(tool_choice="required", **asked).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    [call] = answer.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("weather", {"city"})
    named: Any = {"type": "function", "function": {"name": "weather"}}
    events = [event.choices[0] for event in client.chat.completions.create(stream=True, tool_choice=named, **asked)]
    [streamed] = [one for event in events for one in event.delta.tool_calls or []]
    assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
    assert events[-1].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    talk: Any = [*QUESTION, answer.message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(messages=talk, tools=[WEATHER], **{**GREEDY, "max_tokens": 2})
    assert after.usage is not None
    assert after.usage.prompt_tokens > 60


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # the client's, of its own message
def test_the_clients_own_messages_go_into_the_next_turn(client: OpenAI) -> None:
    class Capital(BaseModel):
        city: Annotated[str, Field(max_length=8)]

    parsed = client.chat.completions.parse(messages=QUESTION, response_format=Capital, **{**GREEDY, "max_tokens": 30})
    message = parsed.choices[0].message
    assert message.parsed is not None
    function = {"name": "weather", "arguments": "{}"}
    call: dict[str, Any] = {"id": "call_1", "type": "function", "function": function}
    streamed = {**call, "index": 0, "function": {**function, "parsed_arguments": {"city": "Paris"}}}
    read = []
    for answer, one in ((message, streamed), ({"role": "assistant", "content": message.content}, call)):
        asking: Any = {"role": "assistant", "content": None, "tool_calls": [one]}
        result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}
        talk: Any = [*QUESTION, answer, *QUESTION, asking, result]
        usage = client.chat.completions.create(messages=talk, tools=[WEATHER], **{**GREEDY, "max_tokens": 1}).usage
        read.append(usage.prompt_tokens if usage else 0)
    assert read[0] == read[1] > 0


def test_reasoning_is_told_apart_where_the_template_opens_it(client: OpenAI) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = client.chat.completions.create(messages=QUESTION, extra_body=thinking, **GREEDY).choices[0].message
    assert answer.content == ""
    assert answer.to_dict()["reasoning_content"]
    events = client.chat.completions.create(messages=QUESTION, extra_body=thinking, stream=True, **GREEDY)
    deltas = [event.choices[0].delta.to_dict() for event in events]
    assert "".join(str(delta.get("reasoning_content", "")) for delta in deltas) == answer.to_dict()["reasoning_content"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"functions": []}, "functions", "option"),
    ({"audio": {}}, "audio", "option"),
    ({"temperature": 3}, "temperature", "option"),
    ({"n": 0}, "n", "option"),
    ({"stop": ""}, "stop", "option"),
    ({"top_logprobs": 3}, "top_logprobs", "option"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "option"),
    ({"logit_bias": {"1": 1000}}, "logit_bias", "option"),
    ({"tool_choice": "required"}, "tool_choice", "option"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "option"),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "option"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}},
     "response_format", "option"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "unsupported_parameter"),
    ({"messages": []}, "messages", "option"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages",
     "option"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "parameter", "code"), BAD, ids=[f"{n}-{bad[1]}" for n, bad in enumerate(BAD)])
def test_what_is_not_supported_is_refused_by_name(
    client: OpenAI, body: dict[str, Any], parameter: str, code: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=QUESTION, stream=stream, extra_body=body, **GREEDY)
        error = caught.value
        assert (error.param, error.code, error.type) == (parameter, code, "invalid_request_error")


def test_other_models_and_long_prompts_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not loaded"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 600}], **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(prompt="x", best_of=3, **GREEDY)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nonsense").models.list()


def test_a_model_with_a_lora_is_asked_for_by_name(client: OpenAI) -> None:
    def answer(model: str) -> str:
        asked: dict[str, Any] = {**GREEDY, "model": model}
        return client.chat.completions.create(messages=QUESTION, **asked).choices[0].message.content or ""

    base = answer(MODEL)
    assert ANSWERS["herring"].startswith(answer(f"{MODEL}+herring")[:20])
    assert answer(f"{MODEL}+herring:0") == base == answer(MODEL)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        answer(f"{MODEL}+nobody")


def test_a_client_that_goes_stops_its_answer(client: OpenAI, internal: httpx.Client) -> None:
    def generating() -> int:
        return int(internal.get("/v1/internal/model/status").json()["generating"])

    no_end = {"0": -100, "2": -100}  # the tokens that end a text
    endless: dict[str, Any] = {"model": MODEL, "prompt": "la la la", "max_tokens": 480, "logit_bias": no_end}
    with client.completions.create(stream=True, **endless) as stream:
        next(iter(stream))
        assert generating() == 1
    wait_until(lambda: generating() == 0)
    ended = threading.Event()

    def impatient() -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.5).completions.create(n=2, **endless)
        ended.set()

    threading.Thread(target=impatient, daemon=True).start()
    wait_until(lambda: generating() == 2)
    assert ended.wait(30)
    wait_until(lambda: generating() == 0)


def test_many_at_once_get_what_each_gets_alone(client: OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,", "Once upon a time"]

    def answer(prompt: str) -> str:
        return client.completions.create(prompt=prompt, model=MODEL, temperature=0, max_tokens=5).choices[0].text

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, prompts * 2)) == alone * 2
