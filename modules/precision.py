"""Which dtype the weights that are not quantized get: one rule for the plan before a load and for the load itself."""

from __future__ import annotations

from collections.abc import Mapping

from modules.options import LoadOptions

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# The quant_methods whose weights are unpacked while they are loaded. On newer GPUs transformers (5.23) multiplies them
# packed, with kernels that it fetches from a hub: a model's process reaches none, and its first answer would fail.
UNPACKED = frozenset({"fp8", "mxfp4"})

_SLOW_BF16 = (
    "This processor has no instructions for bfloat16 and is many times slower in it than in float32: "
    "with bf16 off, the weights take twice the memory."
)


def computes_bf16(capability: tuple[int, int]) -> bool:
    """Whether GPUs compute in bfloat16, of which this is the least compute capability; (0, 0): not known."""
    return capability >= (8, 0) or capability == (0, 0)


def weights_dtype(
    options: LoadOptions, *, stored: str, prequantized: bool, gpus: int, gpu_bf16: bool = True,
    cpu_bf16: bool = True, unpacked: bool = False,
) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    """The dtype's name, with notes on a choice that the options do not show.

    ``stored``: the checkpoint's dtype by name, ``""`` = not known. ``prequantized``: it holds packed weights that
    stay packed (not GGUF, which is unpacked). ``gpus``: how many the options let the model touch; ``gpu_bf16``:
    whether they compute in bfloat16. ``cpu_bf16``: whether the processor does so without detours. ``unpacked``: the
    weights are unpacked, being of those named in UNPACKED.
    """
    if unpacked:  # what lies beside the packed weights keeps its dtype, whatever transformers (5.23) is asked for
        return (stored if stored in DTYPE_BYTES else "bfloat16"), ()
    if gpus == 0:
        if prequantized:
            return (stored if stored in DTYPE_BYTES else "bfloat16"), ()
        if options.load_in_4bit or options.load_in_8bit:
            return ("bfloat16" if cpu_bf16 else "float32"), _without_gpu(options)
        if options.bf16:
            return "bfloat16", _without_gpu(options) if cpu_bf16 else (*_without_gpu(options), _SLOW_BF16)
        slower = "" if cpu_bf16 else ", and is many times slower on this processor"
        return "float32", _without_gpu(options, f", in float32; bf16 halves the memory{slower}")
    if options.bf16 and not prequantized:
        return "bfloat16", ()
    if stored == "bfloat16" and gpu_bf16:
        return "bfloat16", ("The checkpoint is bfloat16 and the GPU has it, so the weights are kept as bfloat16.",)
    return "float16", ()


def _without_gpu(options: LoadOptions, more: str = "") -> tuple[str, ...]:
    return () if options.cpu else (f"No GPU that can be used was found: the model runs on the CPU{more}.",)
