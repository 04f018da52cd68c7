"""How much memory a load will take, before it starts. Pure functions; a rough estimate, and the page says so."""

from __future__ import annotations

from dataclasses import dataclass

from modules.devices import Machine
from modules.library import ModelFacts
from modules.options import LoadOptions
from modules.units import format_bytes

# Bytes a converted parameter takes, scales included (bitsandbytes; block 64), and what stays as it is:
# embeddings, head and norms, a tenth of a small model and less of a large one.
_BYTES_4BIT = 0.5625
_BYTES_8BIT = 1.01
_KEPT_SHARE = 0.1
_WORKING_SHARE = 0.08
_WORKER_RAM_BYTES = 700 * 2**20  # the process with torch and transformers imported
_GPU_FIXED_BYTES = 500 * 2**20  # context and kernels
_BESIDE_MARGIN = 1.3


@dataclass(frozen=True)
class Estimate:
    """What one load would take on the device that holds it: ``RAM``, or ``GPU 0``. All in bytes."""

    device: str
    weights_bytes: int
    cache_bytes: int
    working_bytes: int
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.working_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes

    @property
    def verdict(self) -> str:
        if self.fits:
            return f"Fits, by this estimate: {format_bytes(self.free_bytes - self.total_bytes)} stay free."
        return f"Too large by about {format_bytes(self.total_bytes - self.free_bytes)}."


def estimate(facts: ModelFacts, options: LoadOptions, ctx_tokens: int, machine: Machine) -> Estimate:
    """The memory that loading ``facts`` with ``options`` would take on ``machine``."""
    on_gpu = bool(machine.gpus) and not options.cpu
    weights = _weights_bytes(facts, options, on_gpu)
    cache = kv_cache_bytes(facts, ctx_tokens, 2 if on_gpu or options.bf16 or options.load_in_4bit else 4)
    fixed = _GPU_FIXED_BYTES if on_gpu else _WORKER_RAM_BYTES
    free = sum(gpu.free_bytes for gpu in machine.gpus) if on_gpu else machine.ram_free_bytes
    working = int(weights * _WORKING_SHARE) + fixed
    return Estimate("GPU 0" if on_gpu else "RAM", weights, cache, working, free)


def _weights_bytes(facts: ModelFacts, options: LoadOptions, on_gpu: bool) -> int:
    """Weights by the number of parameters; by the files' size where the number is not known."""
    if facts.quantization or not facts.parameters:
        return facts.size_bytes
    plain = 2 if on_gpu or options.bf16 or options.load_in_4bit or options.load_in_8bit else 4
    if options.load_in_4bit or options.load_in_8bit:
        converted = _BYTES_4BIT if options.load_in_4bit else _BYTES_8BIT
        return int(facts.parameters * (converted * (1 - _KEPT_SHARE) + plain * _KEPT_SHARE))
    return facts.parameters * plain


def kv_cache_bytes(facts: ModelFacts, ctx_tokens: int, element_bytes: int) -> int:
    """2 · layers · kv_heads · head_dim · element bytes · tokens; 0 where the configuration does not say."""
    return 2 * facts.layers * facts.kv_heads * facts.head_dim * element_bytes * ctx_tokens


def fits_beside(needed: Estimate, machine: Machine) -> bool:
    """Whether the new model surely fits while the old one stays: only then it is loaded first."""
    free = machine.ram_free_bytes if needed.device == "RAM" else min(gpu.free_bytes for gpu in machine.gpus)
    return needed.total_bytes * _BESIDE_MARGIN < free
