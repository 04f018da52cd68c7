"""A workaround for bitsandbytes' 4-bit weights on a CPU (0.50.2).

On a CPU with AVX-512 BF16 the first forward repacks the weights in place, and ``state_dict()``, which peft calls to
load a LoRA, packs them back. That way back loses bits, and without double quantization it leaves the scales
transposed: the model is ruined for good. It is taken wherever ``packing_format_for_cpu`` is set, so this is unset
meanwhile. A ``state_dict()`` that leaves the model as it is would make this unnecessary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """Keep packed weights packed. No forward may run meanwhile: it would pack them once more."""
    states = [state for state in map(_quant_state, model.modules()) if _is_packed(state)]
    for state in states:
        state.packing_format_for_cpu = False
    try:
        yield
    finally:
        for state in states:
            state.packing_format_for_cpu = True


def repacks(module: Any) -> bool:
    """Whether the weight of ``module`` is packed for the CPU, or will be: nobody but its own forward can read it."""
    state = _quant_state(module)
    on_cpu = state is not None and module.weight.device.type == "cpu"
    return _is_packed(state) or (on_cpu and bool(getattr(module, "support_avx512bf16_for_cpu", False)))


def _quant_state(module: Any) -> Any:
    return getattr(getattr(module, "weight", None), "quant_state", None)


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))
