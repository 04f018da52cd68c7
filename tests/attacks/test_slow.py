"""Clients that send or read slowly, or too much, on real connections: they hold nobody else up, and no memory."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from modules import access
from modules.access import MOST_BYTES, AccessMiddleware, Role
from modules.web import patience
from tests.attacks.conftest import GUEST, MODEL, Target, load
from tests.supervised import until

CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer guest-key\r\n"
SOON_S = 5.0  # for an answer of a server that nothing holds up, on a busy machine


def connected(target: Target) -> socket.socket:
    return socket.create_connection(target.address, timeout=30)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:  # closed with bytes of ours unread
        pass
    return b"".join(parts)


def answers_soon(target: Target) -> bool:
    began = time.monotonic()
    status = httpx.get(f"{target.url}/v1/models", headers=GUEST, timeout=30).status_code
    return status == 200 and time.monotonic() - began < SOON_S


def rss(target: Target) -> int:
    return int(psutil.Process(target.server.process.pid).memory_info().rss)


def test_answers_on_a_kept_connection_do_not_wait_for_the_network(target: Target) -> None:
    with httpx.Client(base_url=target.url, headers=GUEST) as http:
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert http.get("/v1/models").status_code == 200
            took.append(time.monotonic() - began)
    assert min(took[1:]) < 0.03  # 0.044 where a small packet waits for the one before it


def test_a_body_of_100_mb_is_refused_before_it_comes(target: Target) -> None:
    """By what it says of its length, or once it is too long, where it says nothing; nothing of it is kept."""
    before = rss(target)
    with closing(connected(target)) as connection:
        connection.sendall(f"{CHAT}Content-Length: {100 * 2**20}\r\n\r\n".encode())
        assert answer(connection).startswith(b"HTTP/1.1 413 ")
    sent = 0
    with closing(connected(target)) as connection:
        connection.sendall(f"{CHAT}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        try:
            while sent < 100:
                connection.sendall(piece)
                sent += 1
        except (ConnectionResetError, BrokenPipeError):
            pass
        said = answer(connection)
        assert said.startswith(b"HTTP/1.1 413 ") or (not said and sent < 100)  # or closed before that could be read
    assert MOST_BYTES / 2**20 <= sent < 60
    until(lambda: rss(target) - before < 96 * 2**20, "the memory of refused bodies given back")


def test_a_flood_of_headers_is_refused(target: Target) -> None:
    for flood in (b"X-Long: " + b"x" * 10_000_000, b"".join(b"X-%d: x\r\n" % number for number in range(200_000))):
        with closing(connected(target)) as connection:
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + flood)
            except (ConnectionResetError, BrokenPipeError):
                continue  # closed while it came
            assert answer(connection)[:13] in (b"HTTP/1.1 400 ", b"")
    assert answers_soon(target)


def test_slow_senders_hold_nobody_up(target: Target) -> None:
    """Three hundred connections whose requests do not come to an end: in their head, or in their body."""
    load(target.url)
    open_connections = [connected(target) for _ in range(300)]
    try:
        for number, connection in enumerate(open_connections):
            rest = "X-Slow: " if number % 2 else "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
            connection.sendall(f"{CHAT}{rest}".encode())
        assert answers_soon(target)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert httpx.post(f"{target.url}/v1/chat/completions", json=body, headers=GUEST, timeout=30).status_code == 200
    finally:
        for connection in open_connections:
            connection.close()


def test_slow_readers_of_streams_hold_nobody_up(target: Target) -> None:
    """Their answers are made and wait for them, others' come."""
    load(target.url)
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True, "logprobs": True,
                       "top_logprobs": 20, "n": 4, "max_tokens": 20}).encode()  # fmt: skip
    head = f"{CHAT}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    slow = []
    try:
        for _ in range(4):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read fills up soon
            connection.connect(target.address)
            connection.sendall(head + body)
            slow.append(connection)
        assert answers_soon(target)
        other = httpx.post(f"{target.url}/v1/chat/completions", headers=GUEST, timeout=60,
                           json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 5})  # fmt: skip
        assert other.status_code == 200, other.text
        slow[0].settimeout(60)
        assert slow[0].recv(15) == b"HTTP/1.1 200 OK"
    finally:
        for connection in slow:
            connection.close()


def test_one_guest_does_not_take_all_places(target: Target) -> None:
    """Everything that may be waited for is asked for at once, with one key; somebody else asks meanwhile."""
    load(target.url)
    body = {"messages": [{"role": "user", "content": "x"}], "n": 16, "max_tokens": 20}
    url, limits = f"{target.url}/v1/chat/completions", httpx.Limits(max_connections=None)
    with httpx.Client(headers=GUEST, timeout=120, limits=limits) as client, ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(client.post, url, json=body) for _ in range(16)]
        wait(asked, return_when=FIRST_COMPLETED)  # a refusal: no answer is made as soon
        other = {**GUEST, "x-forwarded-for": "192.0.2.9"}  # as a proxy on this machine tells of it
        assert httpx.post(url, json={**body, "n": 1, "max_tokens": 1}, headers=other, timeout=120).status_code == 200
        answers = [one.result() for one in asked]
    refused = [answer.json()["error"] for answer in answers if answer.status_code == 503]
    assert len(refused) >= 8
    assert {error["code"] for error in refused} == {"overloaded"}
    assert all("no more than 128 may be yours" in error["message"] for error in refused)
    assert {answer.status_code for answer in answers} == {200, 503}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """The address of a door that waits half a second for a request, with nothing behind it but an echo."""
    monkeypatch.setattr(patience, "HEAD_S", 0.5)
    monkeypatch.setattr("modules.access.middleware.BODY_S", 0.5)

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listener = socket.create_server(("127.0.0.1", 0))
    door = AccessMiddleware({Role.ADMIN: echo}, access.Credentials(()), access.Hosts())
    server = uvicorn.Server(uvicorn.Config(door, log_level="error", lifespan="off", http=patience.PatientProtocol,
                                           timeout_keep_alive=60))  # fmt: skip
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    until(lambda: server.started, "the server's start")
    yield listener.getsockname()
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        (b"", b""),
        (b"POST / HT", b""),
        (b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", b""),
        (b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nx", b"HTTP/1.1 408"),
    ],
)
def test_requests_that_do_not_come_to_an_end_are_given_up(
    impatient: tuple[str, int], begun: bytes, said: bytes
) -> None:
    with closing(socket.create_connection(impatient, timeout=20)) as connection:
        connection.sendall(begun)
        assert answer(connection)[:12] == said


def test_requests_that_come_in_time_are_answered(impatient: tuple[str, int]) -> None:
    with closing(socket.create_connection(impatient, timeout=20)) as connection:
        for _ in range(4):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\n")
            time.sleep(0.2)  # well within the limit, together beyond it
            connection.sendall(b"x")
            assert connection.recv(12) == b"HTTP/1.1 200"
            while not connection.recv(4096).endswith(b"ok"):
                pass
        connection.sendall(b"GET / HT")
        assert answer(connection) == b""  # the next one is given up as the first would be
