"""Prompts of token ids that are wanted back as text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.api.openai.test_reaching import application
from tests.loops import run
from tests.supervised import LIMIT_S

MANY = 60  # more than there are threads for requests


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    service, app = application(tmp_path)
    service.load("good").wait_loaded(LIMIT_S)
    yield service, app
    service.close()


def test_a_prompt_of_several_choices_is_decoded_once(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service, app = loaded
    asked: list[tuple[int, ...]] = []

    def decode(ids: tuple[int, ...], _: Any) -> str:
        asked.append(ids)
        return f"{ids} "

    monkeypatch.setattr(service, "decode", decode)
    body = {"model": "good", "prompt": [[1, 2], [3], [1, 2]], "n": 2, "echo": True}
    answer = TestClient(app).post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == [f"{ids} 1 2 " for ids in ((1, 2), (1, 2), (3,), (3,), (1, 2), (1, 2))]
    assert asked == [(1, 2), (3,)]
    plain = TestClient(app).post("/v1/completions", json={"model": "good", "prompt": "3", "echo": True})
    assert plain.json()["choices"][0]["text"] == "31 2 3 "


async def _asked(app: Any, go_on: threading.Event) -> tuple[int, set[int]]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=LIMIT_S) as http:
        body = {"model": "good", "prompt": [1], "max_tokens": 1, "echo": True}
        held = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(MANY)]
        await asyncio.sleep(0.1)
        try:
            page = await asyncio.wait_for(http.get("/v1/models"), LIMIT_S / 2)
        finally:
            go_on.set()
        return page.status_code, {one.status_code for one in await asyncio.gather(*held)}


def test_prompts_that_are_decoded_take_no_thread_from_others(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service, app = loaded
    go_on = threading.Event()
    monkeypatch.setattr(service, "decode", lambda *_: str(go_on.wait(LIMIT_S)))
    page, answers = run(_asked(app, go_on))
    assert page == 200
    assert answers == {200}
