"""Chat templates that loop, grow or compute for ever: ended with a typed error, and the process works on."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from modules.errors import BrokenTemplate, UserError
from modules.options import GenerationOptions
from modules.protocol import GenerateOrder
from modules.worker import templates
from modules.worker.prompts import Prompter
from modules.worker.templates import bounded
from tests.conftest import wait_until

ORDER = GenerateOrder(GenerationOptions(), ({"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}))
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


def prompter(tokenizer: Any, template: str, limit_s: float = 0.5) -> Prompter:
    tokenizer.chat_template = template
    return Prompter(tokenizer, "causal", 2048, template_limit_s=limit_s)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "has run for 0.5 s"),
        ("{% macro f() %}{% for a in range(999) %}{{ f() if a > 900 }}{% endfor %}{% endmacro %}{{ f() }}", "template"),
        ("{% for a in range(300) %}{{ 'x' * 100000 }}{% endfor %}", "makes 30,000,000 characters"),
        ("{{ lipsum(n=10000000) }}", "has run for 0.5 s"),
    ],
)  # fmt: skip
def test_a_template_that_runs_on_is_ended(tokenizer: Any, template: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=words):
        prompter(tokenizer, template).prompt(ORDER)
    assert time.monotonic() - began < 10
    assert prompter(tokenizer, PLAIN).prompt(ORDER).ids == tokenizer("s Hello ").input_ids


@pytest.mark.parametrize(
    "computed", ["10 ** (10 ** 9)", "'x' * 10 ** 9 * 100", "[1] * 10 ** 9", "(10 ** 20000) * (10 ** 20000)"]
)
@pytest.mark.parametrize("ten", ["10", "(messages|length * 10)"])
def test_arithmetic_that_nothing_can_interrupt_is_refused(tokenizer: Any, computed: str, ten: str) -> None:
    """What Jinja would compute while it compiles, and what it can compute only with the messages."""
    with pytest.raises(UserError, match="would give more than a prompt can hold"):
        prompter(tokenizer, "{{ " + computed.replace("10 **", f"{ten} **") + " }}").prompt(ORDER)


def test_what_templates_compute_is_computed(tokenizer: Any) -> None:
    template = "{{ 2 ** 10 }} {{ '-' * 3 }} {{ 1.5 * 2 }} {{ 3 * 4 }}"
    ids = prompter(tokenizer, template).prompt(ORDER).ids
    assert tokenizer.decode(ids) == "1024 --- 3.0 12"


def test_memory_that_grows_ends_a_template() -> None:
    kept: list[bytearray] = []

    def grow() -> None:
        while True:
            kept.append(bytearray(1 << 20))
            time.sleep(0.001)

    with pytest.raises(BrokenTemplate, match="of memory"):
        bounded(grow, 30.0, 64 << 20)
    assert len(kept) < 1024


def test_one_thread_looks_after_all_templates_and_leaves_when_none_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def watching() -> int:
        return sum(thread.name == "template-watch" for thread in threading.enumerate())

    monkeypatch.setattr(templates, "_STAYS_S", 0.2)
    wait_until(lambda: watching() == 0)
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda number: bounded(lambda: number), range(200))) == list(range(200))
        assert watching() == 1
        with pytest.raises(BrokenTemplate, match="has run for"):
            bounded(lambda: [None for _ in iter(lambda: 0, 1)], 0.3)
        wait_until(lambda: watching() == 0)


def test_templates_are_ended_also_where_the_memory_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("psutil.Process", refuse)
    for _ in range(2):
        with pytest.raises(BrokenTemplate, match="has run for"):
            bounded(lambda: [None for _ in iter(lambda: 0, 1)], 0.3)


def test_what_ends_in_time_is_never_hit_late() -> None:
    """At the very moment of the limit, by many threads: each gets its value or its error, and nothing afterwards."""

    def once(number: int) -> bool:
        end = time.monotonic() + 0.1 + number % 10 * 0.002
        try:
            bounded(lambda: [None for _ in iter(lambda: time.monotonic() < end, False)], 0.1)
        except BrokenTemplate:
            ended = True
        else:
            ended = False
        for _ in range(20_000):
            pass
        return ended

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(once, range(40)))) == 40
