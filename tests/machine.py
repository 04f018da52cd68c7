"""What the machine that runs the tests is quick in."""

from __future__ import annotations

from modules.devices import cpu_bf16

# How to load a real model where the dtype is of no matter: half the memory, or a hundred times as quick.
BF16 = cpu_bf16()
DTYPE = "bfloat16" if BF16 else "float32"
QUICK_OPTIONS: dict[str, bool] = {"bf16": True} if BF16 else {}
QUICK_FLAGS: tuple[str, ...] = ("--bf16",) if BF16 else ()
