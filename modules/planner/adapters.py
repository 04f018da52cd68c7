"""LoRAs in the plan: each of their matrices lies beside the weight that it changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from modules.planner.formats import Part
from modules.planner.layout import Layout

Adapters: TypeAlias = tuple[tuple[str, int], ...]  # module → bytes


@lru_cache(maxsize=16)
def with_adapters(layout: Layout, adapters: Adapters) -> Layout:
    """The layout with the LoRAs' bytes in the blocks of their modules; those of an unknown module in the first one."""
    if not adapters:
        return layout
    owners = {module: place for place, block in enumerate(layout.blocks) for module in block.modules}
    added: Counter[int] = Counter()
    for module, size in adapters:
        added[_owner(module, owners)] += size
    blocks = list(layout.blocks)
    for place, size in added.items():
        part = Part("adapter", 0, 0, fixed_bytes=size)
        blocks[place] = replace(blocks[place], parts={**blocks[place].parts, part: 1})
    return replace(layout, blocks=tuple(blocks))


def _owner(module: str, owners: dict[str, int]) -> int:
    """The place of the block that holds ``module``: of itself, or of the nearest module around it."""
    while module and module not in owners:
        module = module.rpartition(".")[0]
    return owners.get(module, 0)
