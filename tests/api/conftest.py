"""One real server that loads on demand, with small models, one that fails and one that brings code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests import checkpoints
from tests.e2e.conftest import Server, serving

ADMIN_KEY = "admin-key"
GUEST_KEY = "guest-key"
MODELS = ("one", "two", "three")


@dataclass
class Several:
    """The server and its clients: OpenAI's with a guest's key, and plain ones."""

    server: Server
    openai: OpenAI
    admin: httpx.Client
    guest: httpx.Client

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Each loaded model as the management route tells of it, in its order."""
        models = self.admin.get("/v1/internal/model/loaded").json()["models"]
        return {one["model_name"]: one for one in models}

    def unload(self, name: str) -> None:
        """End it, where it is loaded."""
        answer = self.admin.post("/v1/internal/model/unload", json={"model_name": name})
        assert answer.status_code in (200, 404), answer.text

    def complete(self, model: str, prompt: str = "a b", tokens: int = 4, key: str = GUEST_KEY, **more: Any) -> Any:
        return self.openai.with_options(api_key=key).completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=more
        )


def _models(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in MODELS:
        (folder / name).symlink_to(checkpoints.llama(), target_is_directory=True)
    (folder / "coded").symlink_to(checkpoints.custom_code(), target_is_directory=True)
    broken = Path(shutil.copytree(checkpoints.llama(), folder / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "no such function"}))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """Nothing is loaded at first; two models may be at a time."""
    home = tmp_path_factory.mktemp("several")
    _models(home / "models")
    flags = ["--api-key", GUEST_KEY, "--admin-key", ADMIN_KEY, "--no-warm-worker", "--load-on-demand"]
    with serving(home, *flags, "--max-loaded", "2", "--load-wait", "60") as server:

        def client(key: str) -> httpx.Client:
            return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=90)

        client_of_openai = OpenAI(base_url=f"{server.url}/v1", api_key=GUEST_KEY, max_retries=0, timeout=90)
        yield Several(server, client_of_openai, client(ADMIN_KEY), client(GUEST_KEY))
