"""The HTTP routes on a real service, over its real application without the page; every error has one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules import api
from modules.errors import WorkerCrashed
from modules.options import LOAD_OPTIONS
from tests.services import Make, services

LOAD = "/v1/internal/model/load"


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    with services(tmp_path, demo_model) as made:
        yield made


def client(service: Any, *, unforeseen: bool = False) -> TestClient:
    """``unforeseen``: with a route that raises what nobody foresaw."""
    app = FastAPI()
    api.install(app, service)
    if unforeseen:

        @app.get("/unforeseen")
        def fail() -> None:
            raise ZeroDivisionError("one divided by nothing")

    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_models_are_listed_those_named_by_path_too(make: Make, demo_model: Path) -> None:
    service = make(("--model", str(demo_model)))
    service.start_model()
    assert client(service).get("/v1/internal/model/list").json() == {"model_names": ["demo", demo_model.name]}


def test_nothing_is_loaded_at_first(make: Make) -> None:
    http = client(make())
    info = http.get("/v1/internal/model/info").json()
    assert (info["state"], info["model_name"], info["notes"], info["error"]) == ("empty", None, [], None)
    assert http.get("/v1/internal/model/status").json()["state"] == "empty"
    assert http.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "model_name: Field required"),
        ({"model_name": 5}, "model_name: Input should be a valid string"),
        ({"model_name": "demo", "arguments": {}}, "arguments: Extra inputs"),
        ({"model_name": "demo", "args": []}, "args: Input should be a valid dictionary"),
        ([], "valid dictionary"),
    ],
)
def test_a_body_of_another_shape_is_an_option_error(make: Make, body: Any, words: str) -> None:
    answer = client(make()).post(LOAD, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (set(answer.json()), error["kind"]) == ({"error"}, "option")
    assert words in error["message"]
    assert "model_name, args, wait, anyway" in error["hint"]


@pytest.mark.parametrize("more", [{}, {"args": None}, {"args": None, "settings": None}, {"args": {}, "settings": {}}])
def test_what_clients_of_text_generation_webui_send_is_taken(make: Make, more: dict[str, Any]) -> None:
    service = make()
    answer = client(service).post(LOAD, json={"model_name": "demo", "wait": False, **more})
    assert answer.status_code == 200, answer.text
    if "settings" not in more:
        answer = client(service).post("/v1/internal/model/plan", json={"model_name": "demo", **more})
        assert answer.status_code == 200, answer.text


def test_settings_that_would_be_lost_are_refused(make: Make) -> None:
    answer = client(make()).post(LOAD, json={"model_name": "demo", "settings": {"instruction_template": "x"}})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "option")
    assert "args" in answer.json()["error"]["hint"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_body_that_is_no_json_is_a_typed_error(make: Make, content: bytes) -> None:
    answer = client(make()).post(LOAD, content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_what_nobody_foresaw_is_an_internal_error_without_a_traceback(make: Make) -> None:
    answer = client(make(), unforeseen=True).get("/unforeseen")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["kind"], error["message"]) == ("internal", "ZeroDivisionError: one divided by nothing")
    assert "Traceback" not in answer.text
    assert error["details"] == ""


@pytest.mark.parametrize("for_guests", [False, True])
def test_details_are_told_to_administrators_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, for_guests: bool
) -> None:
    service, app = make(), FastAPI()
    error = WorkerCrashed("It ended.", details="Traceback in /home/ann")
    failed = replace(service.snapshot(), error=error)
    monkeypatch.setattr(service, "snapshot", lambda: failed)
    api.install(app, service, for_guests=for_guests)

    @app.get("/failing")
    def fail() -> None:
        raise error

    http = TestClient(app)
    for path in ("/failing", "/v1/internal/model/info"):
        told = http.get(path).json()["error"]
        assert (told["message"], told["details"]) == ("It ended.", "" if for_guests else "Traceback in /home/ann")


@pytest.mark.parametrize("name", [name for name, spec in LOAD_OPTIONS.items() if spec.local_only])
def test_options_for_this_machine_only_are_refused(make: Make, name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        answer = client(make()).post(LOAD, json={"model_name": "demo", "args": {spelling: "elsewhere"}})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "option")
        assert LOAD_OPTIONS[name].flag in answer.json()["error"]["message"]


def test_a_path_is_no_name_here(make: Make, demo_model: Path) -> None:
    answer = client(make()).post(LOAD, json={"model_name": str(demo_model)})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (404, "model_not_found")


def test_a_load_tells_what_had_no_effect(make: Make) -> None:
    http = client(make())
    body = {"model_name": "demo", "args": {"bf16": True, "disable-exllama": True, "ctx_size": 12_288}}
    answer = http.post(LOAD, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_name"] == "demo"
    first, second = answer.json()["notes"][:2]
    assert first.startswith("--disable_exllama has no effect here.")
    assert "beyond the model's 8,192" in second
    assert http.get("/v1/internal/model/info").json() == answer.json()
    assert http.post("/v1/internal/model/unload").json()["notes"] == []
