"""Load by click with a warm worker, against a script that imports and calls ``from_pretrained``."""

from __future__ import annotations

import time

from modules.demo import DEMO_MODEL as NAME
from tests.benchmarks.common import (
    FIXTURES,
    Row,
    bare_script,
    call,
    free_port,
    medians,
    ratio_row,
    server_command,
    started,
)
from tests.machine import DTYPE, QUICK_OPTIONS

BARE = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="{DTYPE}")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps({{"parameters": model.num_parameters()}}))
"""
WARM_S = 60


def rows(runs: int = 5) -> list[Row]:
    port = free_port()
    with started(server_command(port), port):

        def ours() -> float:
            _wait_warm(port)
            begun = time.perf_counter()
            call(port, "/v1/internal/model/load", {"model_name": NAME, "args": QUICK_OPTIONS})
            seconds = time.perf_counter() - begun
            call(port, "/v1/internal/model/unload", {})
            return seconds

        def bare() -> float:
            _wait_warm(port)  # so that the warm worker's imports do not slow the script down
            return bare_script(BARE, str(FIXTURES / "models" / NAME))["wall"]

        click, script = medians([ours, bare], runs)
    return [ratio_row("load by click, warm worker, against a bare script", click, script, "s", "≤ 0.5 ×")]


def _wait_warm(port: int) -> None:
    limit = time.monotonic() + WARM_S
    while not call(port, "/v1/internal/model/status")["warm"]:
        if time.monotonic() > limit:
            raise TimeoutError("no warm worker")
        time.sleep(0.1)
