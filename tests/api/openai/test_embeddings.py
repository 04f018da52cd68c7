"""Embeddings for many at once: how they are written, and whose turn it is."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest

from modules.api.openai import embeddings
from modules.api.openai.bodies import EmbeddingBody
from modules.api.threads import Threads
from modules.service.embedding import Vectors
from tests.api.openai.test_reaching import application
from tests.conftest import wait_until
from tests.loops import run
from tests.supervised import LIMIT_S

COUNT, SIZE = 256, 4096


class Ready:
    """An embedder whose vectors are there at once."""

    def __init__(self, *_: Any) -> None:
        vector = struct.pack(f"<{SIZE}f", *(number / 7 for number in range(SIZE)))
        self._vectors = Vectors((vector,) * COUNT, (2,) * COUNT)

    def run(self) -> Vectors:
        return self._vectors

    def stop(self) -> None:
        pass


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(embeddings, "Embedder", Ready)
    service, app = application(tmp_path)
    service.load("good").wait_loaded(LIMIT_S)
    yield app
    service.close()


async def _asked(app: Any, encoding: str) -> tuple[httpx.Response, float, float]:
    """The answer, how long it took, and how long at most the event loop did nothing else meanwhile."""
    longest, begin = 0.0, time.monotonic()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        body = {"model": "good", "input": ["word"], "encoding_format": encoding}
        asked = asyncio.create_task(http.post("/v1/embeddings", json=body))
        last = begin
        while not asked.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return asked.result(), last - begin, longest


def test_many_numbers_are_written_while_others_are_served(app: Any) -> None:
    answer, whole_s, longest_s = run(_asked(app, "float"))
    assert answer.status_code == 200
    assert longest_s < whole_s / 3
    given = answer.json()
    assert [one["index"] for one in given["data"]] == list(range(COUNT))
    assert given["data"][-1]["embedding"] == pytest.approx([number / 7 for number in range(SIZE)])
    assert {key: given[key] for key in ("object", "model")} == {"object": "list", "model": "good"}
    assert given["usage"] == {"prompt_tokens": 2 * COUNT, "total_tokens": 2 * COUNT}
    as_bytes = run(_asked(app, "base64"))[0].json()["data"][1]["embedding"]
    assert struct.unpack(f"<{SIZE}f", base64.b64decode(as_bytes)) == tuple(given["data"][1]["embedding"])


def test_what_is_no_number_is_written_as_none() -> None:
    body = EmbeddingBody(input="word")
    one: Any = Ready()
    one._vectors = Vectors((struct.pack("<2f", float("nan"), 0.5),), (1,))
    assert json.loads(embeddings._whole(one, body, "NaN")[0])["data"][0]["embedding"] == [None, 0.5]


def test_a_user_has_half_of_the_threads_at_most_and_no_turn_is_lost() -> None:
    threads, go_on = Threads(4, "test"), threading.Event()
    inside: list[str] = []

    def hold() -> None:
        inside.append("greedy")
        go_on.wait(LIMIT_S)

    held = [threads.submit("greedy", hold) for _ in range(8)]
    assert threads.submit("modest", lambda: "there").result(LIMIT_S) == "there"
    wait_until(lambda: len(inside) == 2, LIMIT_S)
    failing: Future[None] = threads.submit("modest", lambda: [].pop())
    assert isinstance(failing.exception(LIMIT_S), IndexError)
    assert held[-1].cancel()
    go_on.set()
    for one in held[:-1]:
        one.result(LIMIT_S)
    assert len(inside) == 7
    wait_until(lambda: not threads._inside and not threads._waiting, LIMIT_S)
