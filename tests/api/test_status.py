"""Streams of the status: some for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from modules import api
from modules.api.status import MOST_OF_ONE, MOST_STREAMS
from modules.service.asking import name_user
from tests.loops import run
from tests.services import services

Message = MutableMapping[str, Any]


class Stream:
    """One that is asked for and stays open until :meth:`end`."""

    def __init__(self, app: FastAPI, user: str) -> None:
        self._gone = asyncio.Event()
        self._asked = False
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": "/v1/internal/model/status", "raw_path": b"", "query_string": b"", "root_path": "",
            "headers": [(b"accept", b"text/event-stream")], "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        name_user(scope, user)
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status.set_result(message["status"])

    async def status(self) -> int:
        return await asyncio.wait_for(asyncio.shield(self._status), 20)

    async def end(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self._task, 20)


def test_one_user_leaves_streams_to_the_others(demo_model: Path, tmp_path: Path) -> None:
    async def statuses(app: FastAPI) -> None:
        def ask(user: str, count: int) -> list[Stream]:
            return [Stream(app, user) for _ in range(count)]

        anns = ask("ann", MOST_OF_ONE)
        assert [await one.status() for one in anns] == [200] * MOST_OF_ONE
        further, bobs = ask("ann", 1), ask("bob", 1)
        assert [await one.status() for one in (*further, *bobs)] == [503, 200]
        await anns.pop().end()
        anns += ask("ann", 1)
        assert await anns[-1].status() == 200
        others = [one for n in range(MOST_STREAMS // MOST_OF_ONE) for one in ask(f"user {n}", MOST_OF_ONE)]
        assert sorted([await one.status() for one in others])[-MOST_OF_ONE - 1 :] == [503] * (MOST_OF_ONE + 1)
        for one in (*anns, *further, *bobs, *others):
            await one.end()

    with services(tmp_path, demo_model) as make:
        app = FastAPI()
        api.install(app, make())
        run(statuses(app))
