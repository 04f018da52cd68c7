"""What the API answers to requests that are made up: no answer is the server's own failure, and all have one form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from tests.attacks.conftest import ADMIN, MODEL, Target, load

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/internal/encode", "/v1/internal/decode")
FEW, MANY = 10, 30  # requests of a route, in each way
# Raw JSON, since no library writes most of it.
LITERALS = (
    "NaN", "-Infinity", "1e999", "1" * 400, "1" * 5000, "9223372036854775808", "-1", "true", "null", '""', '"\\ud800"',
    '"\\u0000"', '"' + "x" * 100_000 + '"', "[]", "{}", "[null]", '{"": {}}', "[" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
)  # fmt: skip


@pytest.fixture
def loaded(target: Target) -> Target:
    load(target.url)
    return target


def failure(status: int, body: bytes) -> str:
    """What is wrong with an answer; "" for nothing."""
    if status < 400:
        return ""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without the form of errors: {body[:200]!r}"
    return "" if status < 500 and error["message"] else f"{status} {error}"


def test_no_route_fails_whatever_schemathesis_makes_of_its_description(loaded: Target) -> None:
    """As described, and not as described; the routes that generate first, while a model is there."""
    schema = schemathesis.openapi.from_dict(loaded.schema)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {"/v1/internal/model/load", *GENERATING} <= {one.path for one in operations}
    statuses: Counter[tuple[str, int]] = Counter()
    failed: list[str] = []
    session = requests.Session()
    for operation in sorted(operations, key=lambda one: one.path not in GENERATING):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for case in cases(operation, mode, MANY if operation.path in GENERATING else FEW):
                answer = case.call(base_url=loaded.url, session=session, headers=ADMIN, timeout=60)
                statuses[operation.path, answer.status_code] += 1
                if wrong := failure(answer.status_code, answer.content):
                    failed.append(f"{operation.label} {str(case.body)[:300]} {case.query}: {wrong}")
    assert not failed
    for path in GENERATING:
        assert statuses[path, 200] >= 2, statuses  # not refused for a reason that has nothing to do with the request


def cases(operation: Any, mode: GenerationMode, count: int) -> Iterator[Any]:
    """Requests to one route, the same ones each time. Some name the model that is there, where one is named."""
    made: list[Any] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        if isinstance(case.body, dict) and len(made) % 3 and case.path != "/v1/internal/model/load":
            case.body.update({name: MODEL for name in ("model", "model_name") if name in case.body})
        made.append(case)

    try:
        collect()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # a route that takes nothing cannot be sent it wrongly
    yield from made


def bodies(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, the schema of its body) of every route that takes one."""
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                found = operation["requestBody"]["content"]["application/json"]["schema"]
                reference = next(one["$ref"] for one in (found, *found.get("anyOf", ())) if "$ref" in one)
                yield method, path, schema["components"]["schemas"][reference.rpartition("/")[2]]


def test_no_field_of_any_body_fails_whatever_it_holds(loaded: Target) -> None:
    failed = []
    headers = {**ADMIN, "content-type": "application/json"}
    http = httpx.Client(base_url=loaded.url, headers=headers, timeout=60)
    for method, path, body in bodies(loaded.schema):
        right = {
            name: _right(name, one) for name, one in body["properties"].items() if name in body.get("required", ())
        }
        for field in body["properties"]:
            others = "".join(f"{json.dumps(name)}: {json.dumps(one)}, " for name, one in right.items() if name != field)
            for literal in LITERALS:
                content = f'{{{others}"{field}": {literal}}}'.encode()
                answer = http.request(method, path, content=content)
                if wrong := failure(answer.status_code, answer.content):
                    failed.append(f"{path} {field} {literal[:40]}: {wrong}")
    assert not failed


def needed(body: dict[str, Any]) -> dict[str, Any]:
    """The fields that a body must have, and a short answer."""
    names = {*body.get("required", ()), "max_tokens"}
    return {name: _right(name, one) for name, one in body["properties"].items() if name in names}


def _right(name: str, schema: dict[str, Any]) -> Any:
    """A value that the field takes."""
    messages = [{"role": "user", "content": "x"}]
    named: dict[str, Any] = {"model_name": MODEL, "messages": messages, "lora_names": [], "max_tokens": 1}
    kinds: dict[str, Any] = {"string": "x", "array": [1], "boolean": False, "integer": 1}
    return named[name] if name in named else kinds.get(schema.get("type", "string"), "x")
