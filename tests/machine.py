"""What the machine that runs the tests is quick in."""

from __future__ import annotations

from pathlib import Path


def _quick_in_bf16() -> bool:
    """By the instructions that torch multiplies with on x86; told without torch, which takes seconds to import."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return True
    return "avx2" not in flags or "avx512bw" in flags


# How to load a real model where the dtype is of no matter: half the memory, or 50 times as quick.
BF16 = _quick_in_bf16()
DTYPE = "bfloat16" if BF16 else "float32"
QUICK_OPTIONS: dict[str, bool] = {"bf16": True} if BF16 else {}
QUICK_FLAGS: tuple[str, ...] = ("--bf16",) if BF16 else ()
