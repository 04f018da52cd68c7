"""What the door lets in of bodies, of all requests together."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from modules.access import AccessMiddleware, Role, from_options
from modules.options import ServerOptions
from tests.loops import run

SERVER = ServerOptions(api_key="guest-key", admin_key="admin-key")


async def reader(scope: Scope, receive: Receive, _: Send) -> None:
    """Reads the body and answers nothing."""
    await Request(scope, receive).body()


def test_large_bodies_of_one_user_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that do not come to an end; each is a mebibyte so far, and eight are the most together."""
    door = AccessMiddleware({Role.ADMIN: reader}, from_options(SERVER)[0])
    monkeypatch.setattr("modules.access.middleware.MOST_HELD_BYTES", 8 * 2**20)

    async def ask(key: str, gone: asyncio.Event) -> int:
        told: list[int] = []
        pieces = [b" " * 2**20]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            told.extend([message["status"]] if message["type"] == "http.response.start" else [])

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/completions", "raw_path": b"", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {key}".encode())],
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        with contextlib.suppress(ClientDisconnect):
            await door(scope, receive, send)
        return told[0] if told else 0

    async def all_at_once() -> None:
        for _ in range(2):  # what has gone is given back
            gone = asyncio.Event()
            asked = [asyncio.create_task(ask(key, gone)) for key in ["guest-key"] * 6 + ["admin-key"] * 2]
            done, waiting = await asyncio.wait(asked, timeout=1)
            gone.set()
            await asyncio.wait(waiting)
            assert [one in done and one.result() for one in asked] == [False] * 4 + [503] * 2 + [False] * 2

    run(all_at_once())
