"""``python -m tests.benchmarks [name …]``: measure and print one table."""

from __future__ import annotations

import importlib
import platform
import sys

from tests.benchmarks.common import Row
from tests.machine import DTYPE

NAMES = (
    "start",
    "listing",
    "plan",
    "memory",
    "load",
    "repeat",
    "stream",
    "many",
    "download",
    "loras",
    "alpha",
    "training",
)


def main() -> int:
    chosen = sys.argv[1:] or NAMES
    if unknown := set(chosen) - set(NAMES):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    table: list[Row] = []
    for name in chosen:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        table += importlib.import_module(f"tests.benchmarks.{name}").rows()
    print(f"Python {platform.python_version()}, {platform.machine()}; {DTYPE} where it is of no matter\n")
    print("| what | Loadstone | bare | ratio | aim |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {row.what} | {row.ours} | {row.bare} | {row.ratio} | {row.goal} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
