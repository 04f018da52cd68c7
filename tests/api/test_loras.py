"""The LoRA routes on a real service: text-generation-webui's names, one model loaded for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules import api
from tests import checkpoints, lora_files
from tests.services import services

LIST, LOAD, UNLOAD = (f"/v1/internal/lora/{word}" for word in ("list", "load", "unload"))
INFO, STATUS = "/v1/internal/model/info", "/v1/internal/model/status"


@pytest.fixture(scope="module")
def http(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The routes of a service with two LoRAs for its model ``small``, and one for no model here."""
    home = tmp_path_factory.mktemp("home")
    for name, width in (("one", 128), ("two", 128), ("wide", 4096)):
        lora_files.write(home / "loras" / name, {"model.layers.*.mlp.down_proj": (width, 256)})
    with services(home, demo_model) as make:
        (home / "models" / "small").symlink_to(checkpoints.llama(), target_is_directory=True)
        app = FastAPI()
        api.install(app, make())
        yield TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_they_are_listed(http: TestClient) -> None:
    assert http.get(LIST).json() == {"lora_names": ["one", "two", "wide"]}


def test_without_a_model_none_is_applied(http: TestClient) -> None:
    answer = http.post(LOAD, json={"lora_names": ["one"]})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (409, "nothing_loaded")


def test_a_load_brings_them_and_sets_are_changed_and_taken_off(http: TestClient) -> None:
    loaded = http.post("/v1/internal/model/load", json={"model_name": "small", "args": {"lora": ["one:0.5"]}})
    assert loaded.status_code == 200, loaded.json()
    info = http.get(INFO).json()
    assert (info["lora_names"], info["lora_weights"], info["options"]["lora"]) == (["one"], [0.5], ["one:0.5"])
    shown = http.get(STATUS).json()["shown"]

    report = http.post(LOAD, json={"lora_names": ["two", "one:-0.25"]}).json()
    assert (report["lora_names"], report["lora_weights"]) == (["two", "one"], [1, -0.25])
    assert report["moved_nats"] == 0  # their second matrices are all zeros
    assert report["notes"], "nothing said that they have no effect"
    assert http.get(STATUS).json()["shown"] != shown  # so that every page shows it
    assert http.post(LOAD, json={"lora_names": ["one"], "lora_weights": [2]}).json()["lora_weights"] == [2]

    assert http.post(UNLOAD).json()["lora_names"] == []
    assert http.get(INFO).json()["options"]["lora"] == []


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_names": ["none-here"]}, 404, "adapter_not_found"),
        ({"lora_names": ["../one"]}, 404, "adapter_not_found"),
        ({"lora_names": ["wide"]}, 409, "adapter_mismatch"),
        ({"lora_names": ["one", "one"]}, 422, "option"),
        ({"lora_names": ["one"], "lora_weights": [1, 2]}, 422, "option"),
        ({"lora_names": ["one"], "lora_weights": [7]}, 422, "option"),
        ({"names": []}, 422, "option"),
    ],
)
def test_what_cannot_be_applied_changes_nothing(
    http: TestClient, body: dict[str, object], status: int, kind: str
) -> None:
    if http.get(INFO).json()["model_name"] is None:
        http.post("/v1/internal/model/load", json={"model_name": "small"})
    assert http.post(LOAD, json={"lora_names": ["two:0.75"]}).status_code == 200
    answer = http.post(LOAD, json=body)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert http.get(INFO).json()["options"]["lora"] == ["two:0.75"]
