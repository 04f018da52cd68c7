"""Names that lead out of their folders, through every route and every function of the page; files that nobody gives
out; code that is to run. Nothing beside the folder for models is read or changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS
from modules.settings import Settings
from tests.attacks.conftest import ADMIN, MODEL, SECRET, Target
from tests.attacks.test_fuzz import bodies, needed
from tests.checkpoints import custom_code


@pytest.fixture
def http(target: Target) -> Iterator[httpx.Client]:
    """Requests as an administrator. Afterwards nothing outside has been changed, and no answer held the secret."""
    answered: list[str] = []
    hooks = {"response": [lambda answer: answered.append(answer.read().decode(errors="replace"))]}
    before = contents(target.outside.parent)
    with httpx.Client(base_url=target.url, headers=ADMIN, timeout=60, event_hooks=hooks) as client:
        yield client
    assert answered
    assert not [answer[:500] for answer in answered if SECRET in answer]
    assert contents(target.outside.parent) == before


def contents(home: Path) -> dict[str, bytes]:
    """What lies outside the folder for models, by name."""
    files = [file for file in home.rglob("*") if file.is_file() and "models" not in file.relative_to(home).parts]
    return {str(file): file.read_bytes() for file in files}


def hostile(target: Target) -> list[str]:
    outside = str(target.outside)
    return [
        "../outside",
        outside,
        f"{MODEL}/../../outside",
        "../secret.yaml",
        f"{outside}/config.json",
        outside[1:],
        "..",
        "/",
        f"./{MODEL}/../../outside",
        "..\\outside",
        f"file://{outside}",
        "%2e%2e%2foutside",
        f"{MODEL}\0/../../outside",
        "/proc/self/environ",
    ]


def test_no_name_in_a_request_leads_out_of_its_folder(target: Target, http: httpx.Client) -> None:
    """Each field of each body that takes a text or texts, each part of a path and each part of a query."""
    asked = 0
    for name in hostile(target):
        for method, path, body in bodies(target.schema):
            right = needed(body)
            for field in body["properties"]:
                for value in (name, [name], {"model": name, "lora": [name], "disk_cache_dir": name}):
                    content = {**right, field: value}
                    answer = http.request(method, path.format(key=quote(name, safe=""), action="resume"), json=content)
                    assert answer.status_code < 500, (path, content, answer.text)
                    asked += 1
        for path, methods in target.schema["paths"].items():
            for parameter in methods.get("get", {}).get("parameters", ()):
                where = path.format(**{parameter["name"]: quote(name, safe="")})
                answer = http.get(where, params={parameter["name"]: name} if parameter["in"] == "query" else {})
                assert answer.status_code < 500, (where, answer.text)
                asked += 1
    assert asked > 500


def test_no_name_given_to_the_page_leads_out_of_its_folder(target: Target, http: httpx.Client) -> None:
    """Every function of the page, with such a name in each field that takes a text, and all others as they stand."""
    config = http.get("/config").json()
    components = {one["id"]: one for one in config["components"]}
    worked: set[int] = set()
    for name in hostile(target)[:2]:
        for function in config["dependencies"]:
            data = [_given(components[one], name) for one in function["inputs"]]
            body = {"data": data, "fn_index": function["id"], "session_hash": f"attack{function['id']}"}
            way = "queue/join" if function["queue"] else "run/predict"
            answer = http.post(f"/gradio_api/{way}", json=body)
            assert "Traceback" not in answer.text
            if answer.status_code == 200 and way == "queue/join":
                with http.stream(
                    "GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}
                ) as events:
                    said = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
                answered = any(one["msg"] == "process_completed" for one in said)
            else:
                answered = answer.status_code == 200
            if answered and name in json.dumps(data):
                worked.add(function["id"])
    assert len(worked) > 5  # functions that took a name and answered


def _given(component: dict[str, Any], name: str) -> Any:
    texts = ("textbox", "dropdown", "radio", "state", "json", "html")
    return name if component["type"] in texts else component["props"].get("value")


def test_saved_settings_stay_in_the_folder_for_models(tmp_path: Path, target: Target) -> None:
    models = tmp_path / "models"
    models.mkdir()
    settings = Settings(tmp_path / "settings.yaml", models)
    for name in (*hostile(target), "a" * 5000, "", ".", "settings", "CON", "x\ny"):
        try:
            written = settings.save(name, {"ctx_size": 64})
        except (LoadstoneError, OSError, ValueError):
            continue
        assert written.resolve().is_relative_to(models.resolve()), name
    assert {one.name for one in tmp_path.iterdir()} <= {"models", "settings.yaml"}


def test_no_file_is_given_out(target: Target, http: httpx.Client) -> None:
    """By any route of Gradio's that reads, relays or serves a file."""
    secret = str(target.outside.parent / "secret.yaml")
    paths = (secret, secret[1:], "../secret.yaml", "secret.yaml", f"{MODEL}/../../secret.yaml", f"file://{secret}")
    ways = ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "svelte/", "gradio_api/proxy=",
            "custom_component/x/client/component/", "gradio_api/stream/", "pwa_icon/", "theme.css/")  # fmt: skip
    for path in paths:
        for form in (path, quote(path, safe=""), quote(quote(path, safe=""), safe="")):
            for way in ways:
                assert http.get(f"/{way}{form}").status_code >= 300, (way, form)
    assert http.get(f"/gradio_api/proxy={target.url}/v1/models").status_code >= 400  # no requests in our name either


def test_an_uploaded_file_lands_where_gradio_keeps_them(target: Target, http: httpx.Client) -> None:
    for name in (
        "../../../outside/config.json",
        str(target.outside / "config.json"),
        "..\\..\\x",
        "../" * 12 + "tmp/x",
    ):
        answer = http.post("/gradio_api/upload", files={"files": (name, b"changed")})
        for path in answer.json() if answer.status_code == 200 else ():
            assert ".." not in Path(path).parts
            assert not Path(path).is_relative_to(target.outside.parent)


def test_no_code_of_a_model_runs_for_a_request(target: Target, http: httpx.Client, tmp_path: Path) -> None:
    """Whatever the request says; nor can it choose where layers go on this machine."""
    marker, folder = tmp_path / "ran", target.outside.parent / "models" / "own-code"
    shutil.copytree(custom_code(), folder)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w').close()\n{file.read_text()}")
    for args in ({}, {"trust_remote_code": True}, {"trust-remote-code": True}):
        answer = http.post("/v1/internal/model/load", json={"model_name": "own-code", "args": args, "anyway": True})
        assert 400 <= answer.status_code < 500, answer.text
        http.post("/v1/chat/completions", json={"model": "own-code", "messages": [{"role": "user", "content": "x"}]})
    assert not marker.exists()
    local = [name for name, spec in LOAD_OPTIONS.items() if spec.local_only]
    assert local
    for name in local:
        answer = http.post("/v1/internal/model/load", json={"model_name": MODEL, "args": {name: str(target.outside)}})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "option")
    shutil.rmtree(folder)
