"""Perplexity against length for some alphas: 1.75 is said to suit 1.5 times, 2.5 twice the model's own context.

One window of twice the context on English reference prose, read once for each alpha; the perplexity of its eighths
shows where predictions fall apart. A few minutes for each alpha on a processor: one text and one model are measured.
"""

from __future__ import annotations

import inspect
import math
import os
import pydoc_data.topics
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from modules.demo import DEMO_MODEL
from modules.perplexity import Perplexity, PerplexityOrder
from tests.benchmarks.common import FIXTURES, Row
from tests.checkpoints import order_for

ALPHAS = (1.0, 1.75, 2.5)
CONTEXT = 8192  # the demo model's own


def text() -> str:
    """The reference of the Python language, as Python brings it for its help."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(inspect.cleandoc(topics[name]) for name in sorted(topics))


def measured(alpha: float, window: int = 2 * CONTEXT) -> Perplexity:
    """The perplexity of one window of that many tokens."""
    from modules.worker import perplexity, transformers_loader

    with tempfile.TemporaryDirectory() as work:
        order = order_for(
            FIXTURES / "models" / DEMO_MODEL, Path(work), cpu=True, bf16=True, alpha_value=alpha, ctx_tokens=window
        )  # fmt: skip
        loaded = transformers_loader.load(order, lambda _: None)
    measurement = perplexity.Measurement(loaded, PerplexityOrder(text(), window, window, window))
    while not measurement.over:
        measurement.window(lambda _: None, threading.Event())
    return measurement.result()


def of(stretches: Sequence[float | None]) -> float:
    """The perplexity of some stretches together; they are equally long."""
    logs = [math.log(value) for value in stretches if value is not None]
    return math.exp(sum(logs) / len(logs))


def rows() -> list[Row]:
    found: dict[float, Perplexity] = {}
    for alpha in ALPHAS:
        found[alpha] = measured(alpha)
        print(f"alpha {alpha:g} took {found[alpha].seconds:.0f} s", file=sys.stderr, flush=True)
    base = found[1.0]
    lengths = "".join(f" {base.stretch_tokens * (place + 1):,}" for place in range(len(base.stretches)))
    table = [Row(f"perplexity up to each of{lengths} tokens ({os.environ.get('OMP_NUM_THREADS', 'all')} threads)",
                 "", "", "", "")]  # fmt: skip
    for alpha, one in found.items():
        by_place = " ".join("–" if value is None else f"{value:.1f}" for value in one.stretches)
        table.append(Row(f"alpha {alpha:g}", by_place, "", "", ""))
    for alpha, first, last, goal in (
        (1.75, 4, 6, "stays near alpha 1 within the context, and far below it beyond: 1.5 ×"),
        (2.5, 4, 8, "the same: 2 ×"),
    ):
        ours, bare = of(found[alpha].stretches[first:last]), of(base.stretches[first:last])
        inside = of(found[alpha].stretches[:4]) / of(base.stretches[:4])
        table.append(
            Row(
                f"alpha {alpha:g} against alpha 1 from the context's end to {last / 4:g} × (within it: {inside:.2f} ×)",
                f"{ours:.1f}", f"{bare:.1f}", f"{ours / bare:.2f} ×", goal,
            )
        )  # fmt: skip
    return table
