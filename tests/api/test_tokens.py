"""Texts to be counted keep nobody waiting but those who sent them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from modules.service.asking import name_user
from tests.api.openai.test_reaching import application
from tests.loops import run
from tests.supervised import LIMIT_S

MANY = 60  # more than there are threads for requests


async def _while_held(app: Any, go_on: threading.Event) -> tuple[list[int], list[Any]]:
    """What others are answered while one user's texts are in the tokenizer, and then what that one is answered."""

    async def named(scope: Any, receive: Any, send: Any) -> None:
        name_user(scope, dict(scope["headers"]).get(b"x-user", b"").decode())
        await app(scope, receive, send)

    transport = httpx.ASGITransport(named)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=LIMIT_S) as http:

        def count(text: str, user: str) -> Any:
            return http.post("/v1/internal/token-count", json={"text": text}, headers={"x-user": user})

        held = [asyncio.create_task(count("hold", "greedy")) for _ in range(MANY)]
        await asyncio.sleep(0.1)
        try:
            others = [await asyncio.wait_for(one, LIMIT_S / 2) for one in (
                http.get("/v1/models"), count("quick", "modest"),
            )]  # fmt: skip
        finally:
            go_on.set()
        return [one.status_code for one in others], [one.json() for one in await asyncio.gather(*held)]


def test_one_users_texts_take_no_thread_from_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, app = application(tmp_path)
    service.load("good").wait_loaded(LIMIT_S)
    go_on = threading.Event()

    def encode(text: str) -> list[int]:
        if text == "hold":
            go_on.wait(LIMIT_S)
        return [1, 2]

    monkeypatch.setattr(service, "encode", encode)
    others, held = run(_while_held(app, go_on))
    assert others == [200, 200]
    assert held == [{"length": 2}] * MANY
    service.close()
