"""A conformance suite from PyPI, OpenAI's OpenAPI description and the types of its client, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import llm_comply
import pytest
from llm_comply import runner
from llm_comply.config import ComplianceConfig
from llm_comply.schema import SpecLoader
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS
from openai import BaseModel
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.openai.conformance import CASES, SHAPES
from tests.api.openai.conftest import KEY, MODEL
from tests.e2e.conftest import Server

pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated")

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 6}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OURS = {"loaded", "reasoning_content"}  # fields beside OpenAI's, which README names


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> SpecLoader:
    """OpenAI's description of its API, as llm-comply brings it."""
    found = json.loads((Path(llm_comply.__file__).parent / "specs" / "openai_chat.json").read_text(encoding="utf-8"))
    file = tmp_path_factory.mktemp("described") / "openai.json"
    file.write_text(json.dumps({**found, "components": nullable(found["components"])}), encoding="utf-8")
    return SpecLoader(str(file))


def nullable(schema: Any) -> Any:
    """With null among what is taken where the description says ``nullable``: beside an enum or a reference JSON Schema
    would not take it from that alone.
    """
    if isinstance(schema, list):
        return [nullable(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: nullable(one) for name, one in schema.items() if name != "nullable" or one is not True}
    return {"anyOf": [changed, {"type": "null"}]} if schema.get("nullable") is True else changed


def test_the_conformance_suite_says_what_is_told_of_it(
    api: Server, internal: httpx.Client, described: SpecLoader
) -> None:
    """Its cases as they are, but with the likeliest tokens, and ends made likelier: seconds, and the same each time.

    The demo model would end its sentences, and the text in a tool's arguments, when it likes to.
    """
    config = ComplianceConfig(base_url=f"{api.url}/v1", api_key=KEY, model=MODEL)

    def token(text: str) -> str:
        [found] = internal.post("/v1/internal/encode", json={"text": text}).json()["tokens"]
        return str(found)

    bias = {token("<|im_end|>"): 4}
    tools = {token('"'): 8, token('"}'): 8}

    def shortened(case: Any) -> Any:
        def request(cfg: ComplianceConfig) -> dict[str, Any]:
            body = case.build_request(cfg)
            return {
                **body,
                "temperature": 0,
                "max_tokens": 60,
                "logit_bias": {**bias, **(tools if "tools" in body else {})},
            }

        return replace(case, build_request=request)

    ran = runner.TestRunner(config, [shortened(case) for case in OPENAI_CHAT_TESTS], described).run_all()
    assert [result.id for result in ran.results] == [case.id for case in CASES]
    for result, case in zip(ran.results, CASES, strict=True):
        assert (result.status.value == "passed") is not bool(case.differs), result.to_dict()
        assert case.differs or not result.warnings, result.to_dict()
    said = {result.id: " ".join(result.errors) for result in ran.results}
    assert "HTTP 400" in said["chat-image-input"]
    assert "HTTP 200" in said["chat-error-handling"]
    assert ran.skipped == 1


def answers(internal: httpx.Client) -> Iterator[tuple[str, type[BaseModel], dict[str, Any]]]:
    """(name in the description, type of the client, answer)."""
    for body in (
        HELLO,
        {**HELLO, "logprobs": True, "top_logprobs": 2},
        {**HELLO, "n": 2, "temperature": 1, "seed": 1},
        {**HELLO, "max_tokens": 40, "tools": [TOOL], "tool_choice": "required"},
    ):
        yield "CreateChatCompletionResponse", ChatCompletion, post(internal, "/v1/chat/completions", body)
        streamed = {**body, "stream_options": {"include_usage": True}}
        for event in events(internal, "/v1/chat/completions", streamed):
            yield "CreateChatCompletionStreamResponse", ChatCompletionChunk, event
    text = {"prompt": "One, two,", "temperature": 0, "max_tokens": 4, "logprobs": 2}
    yield "CreateCompletionResponse", Completion, post(internal, "/v1/completions", text)
    for event in events(internal, "/v1/completions", text):
        for choice in event["choices"]:  # before the end it is null, OpenAI's too, whose description does not say so
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        yield "CreateCompletionResponse", Completion, event


def post(internal: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = internal.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(internal: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with internal.stream("POST", path, json={"model": MODEL, **body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def beyond(found: Any) -> Iterator[str]:
    """The fields that the client's types do not know."""
    if isinstance(found, BaseModel):
        yield from found.model_extra or ()
        for name in type(found).model_fields:
            yield from beyond(getattr(found, name))
    elif isinstance(found, list):
        for one in found:
            yield from beyond(one)


def test_every_answer_fits_openais_description_and_the_types_of_its_client(
    internal: httpx.Client, described: SpecLoader
) -> None:
    checked = set()
    for name, kind, answer in answers(internal):
        assert described.validate(answer, name) == [], answer
        assert set(beyond(kind.model_validate(answer, strict=True))) <= OURS, answer
        checked.add(name)
    models = internal.get("/v1/models").json()
    assert described.validate(models, "ListModelsResponse") == []
    for one in models["data"]:
        assert set(beyond(Model.model_validate(one, strict=True))) <= OURS
    assert models["data"]
    refused = internal.post("/v1/chat/completions", json={"messages": [], "model": MODEL})
    assert refused.status_code == 400
    assert described.validate(refused.json(), "ErrorResponse") == []
    assert checked | {"ListModelsResponse", "ErrorResponse"} == {shape for shape, _ in SHAPES}
