"""How quickly a plan is there: headers read for the first time, and again after an option changed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from modules.devices import Gpu, Machine
from modules.options import LoadOptions
from modules.planner import Checkpoint, plan, read_checkpoint
from tests.benchmarks.common import Row, medians
from tests.planner_checkpoints import deepseek_v3, llama_70b

GIB = 2**30
MACHINE = Machine(
    tuple(Gpu(index, "simulated", str(index), 24 * GIB, 24 * GIB) for index in range(2)), 64 * GIB, 64 * GIB, 900 * GIB
)
CHANGES = (LoadOptions(), LoadOptions(load_in_4bit=True), LoadOptions(load_in_8bit=True, cpu_memory=40, disk=True))


def rows(runs: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as work:
        llama, deepseek = llama_70b(Path(work, "llama-70b")), deepseek_v3(Path(work, "deepseek-v3"))
        found = [
            *_first("a model shaped like Llama 70B", llama, "≤ 0.1 s", runs),
            *_first("a model shaped like DeepSeek-V3", deepseek, "≤ 1 s", runs),
        ]
        known = read_checkpoint(llama)
        for options in CHANGES:
            named = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(options, name)), "as stored")
            seconds = medians([lambda options=options: _seconds(known, options)], runs * 4)[0]  # type: ignore[misc]
            found.append(Row(f"plan again, Llama 70B, {named}", f"{1000 * seconds:.1f} ms", "–", "–", "≤ 20 ms"))
    return found


def _first(what: str, folder: Path, goal: str, runs: int) -> list[Row]:
    """Headers and plan together, against parsing the same headers alone."""

    def ours() -> float:
        begun = time.perf_counter()
        plan(read_checkpoint(folder), LoadOptions(), MACHINE, ctx_tokens=8192)
        return time.perf_counter() - begun

    def bare() -> float:
        begun = time.perf_counter()
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as opened:
                json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return time.perf_counter() - begun

    functions: list[Callable[[], float]] = [ours, bare]
    mine, parsing = medians(functions, runs)
    return [Row(f"first plan of {what}", f"{mine:.3f} s", f"{parsing:.3f} s", f"{mine / parsing:.1f} ×", goal)]


def _seconds(checkpoint: Checkpoint, options: LoadOptions) -> float:
    begun = time.perf_counter()
    plan(checkpoint, options, MACHINE, ctx_tokens=8192)
    return time.perf_counter() - begun
