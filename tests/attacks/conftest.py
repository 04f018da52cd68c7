"""One real server with a small real model, a Hub beside it, and what an attacker finds on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from modules import api
from tests.api.openai.conftest import TEMPLATE
from tests.checkpoints import llama
from tests.e2e.conftest import Server, serving
from tests.hub_models import tiny_files
from tests.hub_server import Hub, Repo
from tests.services import services

MODEL = "tiny"
GUEST = {"authorization": "Bearer guest-key"}
ADMIN = {"authorization": "Bearer admin-key"}
SECRET = "nobody-may-read-this-7c1e"


@dataclass(frozen=True)
class Target:
    """The server under attack. ``outside`` lies beside its folder for models, and is nobody's to read or change."""

    server: Server
    schema: dict[str, Any]  # the OpenAPI description of the administrator's routes
    outside: Path

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = tmp_path_factory.mktemp("attacked")
    folder = home / "models" / MODEL
    shutil.copytree(llama(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (home / "outside").mkdir()
    (home / "outside" / "config.json").write_text(json.dumps({"model_type": "llama", "secret": SECRET}))
    (home / "secret.yaml").write_text(f"secret: {SECRET}\n")
    repos = {"tester/tiny": Repo({"main": tiny_files()})}
    flags = ("--api-key", "guest-key", "--admin-key", "admin-key", "--gradio-auth", "root:one", "--no-warm-worker")
    with pytest.MonkeyPatch.context() as environment, Hub(repos) as hub:
        environment.setenv("HF_ENDPOINT", hub.url)
        environment.setenv("HF_HUB_OFFLINE", "0")
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        environment.setenv("OMP_NUM_THREADS", "1")
        with serving(home, *flags) as server:
            load(server.url)
            yield Target(server, described(tmp_path_factory.mktemp("described")), home / "outside")


def load(url: str) -> None:
    """Have the model loaded, with a short context, so that every answer ends soon."""
    info = httpx.get(f"{url}/v1/internal/model/info", headers=ADMIN, timeout=30).json()
    if (info["model_name"], info["context_tokens"]) == (MODEL, 64):
        return
    body = {"model_name": MODEL, "args": {"ctx_size": 64}}
    answer = httpx.post(f"{url}/v1/internal/model/load", json=body, headers=ADMIN, timeout=120)
    assert answer.status_code == 200, answer.text


def described(home: Path) -> dict[str, Any]:
    """The OpenAPI description of the API, which the server itself does not give away."""
    with services(home, llama()) as make:
        app = FastAPI()
        api.install(app, make())
        return app.openapi()
