"""Ten minutes of mixed load over HTTP while the model's process is killed at random: ``pytest -m soak``."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from modules.errors import Cancelled, NothingLoaded, WorkerCrashed, WorkerKilled
from tests.e2e.conftest import Server, serving, wait_for
from tests.worker.batches import tiny_llama

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

SECONDS = 600.0
ASKERS, QUESTIONS = 16, 12
KILL_EVERY_S = (15.0, 40.0)
_SETTLED_S = 120.0  # when memory is measured first
_FLAT_BYTES = 64 * 2**20
_BY_A_KILL = {error.kind for error in (WorkerKilled, WorkerCrashed, NothingLoaded, Cancelled)}
_TEXT = "One two The capital of France is Once upon a time there was a dog x = 1 Count from one"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    (models / "tiny").symlink_to(tiny_llama(), target_is_directory=True)
    with serving(models.parent, "--max-batch", "8") as server:
        yield server


def load(server: Server) -> None:
    status, body = server.load("tiny", cpu=True, ctx_size=256)
    assert status == 200, body


def body_of(number: int) -> tuple[str, dict[str, Any]]:
    """The route and the body of one of the questions: each with its own length, sampling, seed and stop."""
    own: dict[str, Any] = {"temperature": (0.0, 0.9)[number % 2], "seed": number, "max_tokens": 8 + 7 * (number % 6)}
    if number % 5 == 0:
        own["stop"] = ["a"]
    text = _TEXT[4 * number :]
    if number % 3:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **own}
    return "/v1/completions", {"prompt": text, **own}


def text_of(body: dict[str, Any]) -> str:
    """What one body, whole or a part of a stream, says."""
    said = ""
    for choice in body["choices"]:
        said += choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
    return said


@dataclass
class Seen:
    """How requests ended, and what was wrong about them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.ended[what] += 1
            if problem:
                self.wrong.append(f"{what}: {problem[:300]}")


class Client:
    """One of many: a connection for each request."""

    def __init__(self, server: Server, seen: Seen, expected: dict[int, Any]) -> None:
        self._host = urlsplit(server.url).netloc
        self._seen = seen
        self._expected = expected

    def send(self, path: str, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def whole(self, number: int) -> None:
        connection, response = self.send(*body_of(number))
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            self._refused("whole", response.status, answer)
        else:
            self._compare("whole", number, text_of(answer))

    def streamed(self, number: int, *, leaves: bool) -> None:
        path, body = body_of(number)
        connection, response = self.send(path, {**body, "stream": True})
        if response.status != 200:
            self._refused("streamed", response.status, json.loads(response.read()))
            return
        said, over, failed = "", False, False
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if failed := "error" in event:
                    self._refused("streamed", 200, event)
                    break
                said += text_of(event)
                if leaves and said:
                    break
            over = over or line.startswith(b"data: [DONE]")
        connection.close()
        if over and not failed:
            self._compare("streamed", number, said)
        elif not self._expected[number].startswith(said) or not (failed or (leaves and said)):
            self._seen.note("left", f"{number}: {said!r} for {self._expected[number]!r}")
        elif not failed:
            self._seen.note("left")

    def counted(self, number: int) -> None:
        connection, response = self.send("/v1/internal/token-count", {"text": _TEXT})
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            self._refused("counted", response.status, answer)
        else:
            self._seen.note("counted", "" if answer["length"] == self._expected[-1] else str(answer))

    def _compare(self, what: str, number: int, said: str) -> None:
        right = said == self._expected[number]
        self._seen.note(what, "" if right else f"{number}: {said!r} for {self._expected[number]!r}")

    def _refused(self, what: str, status: int, answer: dict[str, Any]) -> None:
        """A typed error that a killed process explains, and nothing else."""
        error = answer.get("error") or answer
        kind = str(error.get("code") or error.get("kind"))
        explained = kind in _BY_A_KILL
        self._seen.note(f"{what}, refused: {kind}", "" if explained else f"{status} {answer}")
        time.sleep(0.2)


def ask(client: Client, chance: random.Random, stop: threading.Event, seen: Seen) -> None:
    kinds: tuple[Callable[[int], None], ...] = (
        client.whole, partial(client.streamed, leaves=False), partial(client.streamed, leaves=True), client.counted,
    )  # fmt: skip
    while not stop.is_set():
        try:
            chance.choice(kinds)(chance.randrange(QUESTIONS))
        except Exception as error:  # a request that ends with neither a result nor an error of ours
            seen.note("broken", repr(error))


def kill(server: Server, chance: random.Random, until: float) -> int:
    """Kill the model's process again and again, and load the model anew; how often."""
    kills = 0
    while (wait := chance.uniform(*KILL_EVERY_S)) + time.monotonic() < until:
        time.sleep(wait)
        (holder,) = [one for one in server.workers() if one.memory_info().rss == max(_sizes(server))]
        holder.kill()
        wait_for(lambda: server.info()["state"] != "ready", "that the end is noticed")
        load(server)
        kills += 1
    return kills


def _sizes(server: Server) -> list[int]:
    return [worker.memory_info().rss for worker in server.workers()]


def answers(server: Server) -> dict[int, Any]:
    """What each question is answered alone; at -1 how many tokens the text has."""
    single = Client(server, Seen(), {})
    found = {number: text_of(json.loads(single.send(*body_of(number))[1].read())) for number in range(QUESTIONS)}
    counted = single.send("/v1/internal/token-count", {"text": _TEXT})[1].read()
    return {**found, -1: json.loads(counted)["length"]}


@dataclass
class Sizes:
    """Bytes that are held: by the web process from when all is under way, by the model's from its last load."""

    web: list[int] = field(default_factory=list)
    model: list[int] = field(default_factory=list)

    def flat(self) -> bool:
        return all(sizes[-1] < sizes[0] + _FLAT_BYTES for sizes in (self.web, self.model))


def disturb(server: Server) -> tuple[int, Sizes]:
    """Kill the model's process for :data:`SECONDS`: how often, and what was held before and after."""
    web, begun, sizes = psutil.Process(server.process.pid), time.monotonic(), Sizes()
    kills = kill(server, random.Random(5), begun + _SETTLED_S)
    sizes.web.append(web.memory_info().rss)
    kills += kill(server, random.Random(6), begun + SECONDS)
    sizes.model.append(max(_sizes(server)))
    time.sleep(20)
    sizes.model.append(max(_sizes(server)))
    sizes.web.append(web.memory_info().rss)
    return kills, sizes


def test_mixed_load_with_the_models_process_killed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    load(server)
    seen, stop, expected = Seen(), threading.Event(), answers(server)
    threads = [
        threading.Thread(target=ask, args=(Client(server, seen, expected), random.Random(seed), stop, seen))
        for seed in range(ASKERS)
    ]
    for thread in threads:
        thread.start()
    try:
        kills, sizes = disturb(server)
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    with capsys.disabled():
        print(f"\n{kills} kills; {sizes}; {dict(seen.ended.most_common())}")
    assert not any(thread.is_alive() for thread in threads)
    assert seen.wrong == []
    assert kills > 10
    assert sizes.flat()
    assert all(seen.ended[what] > 100 for what in ("whole", "streamed", "left", "counted"))
