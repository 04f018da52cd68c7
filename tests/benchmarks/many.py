"""Many clients of the API at once, against a bare script that answers them one after another; and one client alone."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

from modules.demo import DEMO_MODEL as NAME
from tests.benchmarks.common import FIXTURES, Row, call, free_port, ratio_row, server_command, started
from tests.machine import DTYPE, QUICK_FLAGS

CLIENTS, TOKENS = 16, 64
FIRST_TOKENS = 40  # how often the time to the first token is measured


@dataclass
class Got:
    """What one client saw: seconds from its question to the first text and to the last, and tokens."""

    first_s: float
    last_s: float
    tokens: int

    @property
    def speed(self) -> float:
        """Tokens per second from the first one to the last."""
        return (self.tokens - 1) / (self.last_s - self.first_s)


class Bare:
    """The same by transformers alone, in this process."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = str(FIXTURES / "models" / NAME)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._times: list[float] = []

    def put(self, _: Any) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def answer(self, asked: list[dict[str, str]], tokens: int) -> Got:
        begin = time.perf_counter()
        self._times = []
        inputs = self._tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=self)
        return Got(self._times[1] - begin, self._times[-1] - begin, len(self._times) - 1)


def messages(client: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell a long story about a ship with {client + 2} sails and its crew."}]


def ask(port: int, asked: list[dict[str, str]], tokens: int) -> Got:
    """One client's answer, streamed."""
    body = {"messages": asked, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port)
    begin = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    times, used = [], 0
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            used = event["usage"]["completion_tokens"]
        if any(choice["delta"].get("content") for choice in event["choices"]):
            times.append(time.perf_counter() - begin)
    connection.close()
    return Got(times[0], times[-1], used)


def together(port: int) -> tuple[float, float]:
    """All clients at once: tokens per second of all together, and the mean seconds to the first token."""
    got: list[Got] = []
    threads = [
        threading.Thread(target=lambda one=one: got.append(ask(port, messages(one), TOKENS))) for one in range(CLIENTS)
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    return sum(each.tokens for each in got) / seconds, statistics.mean(each.first_s for each in got)


def one_after_another(bare: Bare) -> tuple[float, float]:
    """The same, where each waits for those before."""
    begin, firsts, tokens = time.perf_counter(), [], 0
    for client in range(CLIENTS):
        waited = time.perf_counter() - begin
        got = bare.answer(messages(client), TOKENS)
        firsts.append(waited + got.first_s)
        tokens += got.tokens
    return tokens / (time.perf_counter() - begin), statistics.mean(firsts)


def rows(runs: int = 2) -> list[Row]:
    bare, port = Bare(), free_port()
    flags = ["--model", NAME, *QUICK_FLAGS, "--no-warm-worker"]
    with started(server_command(port, *flags), port):
        while call(port, "/v1/internal/model/status")["state"] != "ready":
            time.sleep(0.2)
        together(port)  # once, so that both have computed everything before
        bare.answer(messages(0), TOKENS)
        many = [(together(port), one_after_another(bare)) for _ in range(runs)]
        alone = [_one_client(port, bare) for _ in range(2 * runs)]
        firsts = [_first_tokens(port, bare, client) for client in range(FIRST_TOKENS)]
    (speed, wait), (bare_speed, bare_wait) = (
        [statistics.median(run[side][figure] for run in many) for figure in (0, 1)] for side in (0, 1)
    )
    first, bare_first = (1000 * statistics.median(pair[side] for pair in firsts) for side in (0, 1))
    added = 1000 * statistics.median(ours - theirs for ours, theirs in firsts)
    lone, bare_lone = (statistics.median(pair[side] for pair in alone) for side in (0, 1))
    clients = f"{CLIENTS} clients"
    return [
        ratio_row(f"{clients}: all tokens/s, against one after another", speed, bare_speed, "tokens/s", "≥ 5 ×"),
        Row(f"{clients}: mean time to the first token, against the same", f"{wait:.2f} s", f"{bare_wait:.2f} s",
            f"{wait / bare_wait:.2f} ×", "≤ 2 s"),
        ratio_row("one client: tokens/s, against bare generate()", lone, bare_lone, "tokens/s", "≥ 0.97 ×"),
        Row("time to the first token by the API", f"{first:.1f} ms", f"{bare_first:.1f} ms", f"{added:+.1f} ms",
            "≤ 5 ms more"),
    ]  # fmt: skip


def _one_client(port: int, bare: Bare) -> tuple[float, float]:
    """Tokens per second by the API and bare."""
    asked, tokens = messages(0), 2 * TOKENS
    return ask(port, asked, tokens).speed, bare.answer(asked, tokens).speed


def _first_tokens(port: int, bare: Bare, client: int) -> tuple[float, float]:
    """Seconds to the first token by the API and bare; a pause lets the other's computing threads fall asleep."""
    time.sleep(0.2)
    ours = ask(port, messages(client), 2).first_s
    time.sleep(0.2)
    return ours, bare.answer(messages(client), 2).first_s
