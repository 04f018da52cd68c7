"""The checkpoint as it lies in memory where the loader unpacks packed weights, since nothing here multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from modules.library.tensors import TensorInfo
from modules.planner.checkpoint import Checkpoint

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP8_SCALES = (".weight_scale_inv", ".activation_scale", ".scale", ".qscale_weight")  # as transformers 5.23 knows them
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"  # of MXFP4
_STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@lru_cache(maxsize=8)  # layouts are kept by the object
def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its FP8 or MXFP4 weights as plain ones, and without their scales."""
    dtype = _STORED_AS.get(checkpoint.stored_dtype, "BF16")
    names = checkpoint.tensors
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in names.items():
        if name.endswith(_BLOCKS) and len(tensor.shape) == 4:  # …, rows, blocks in a row, bytes of two numbers
            *outer, blocks, size = tensor.shape
            tensors[name.removesuffix(_BLOCKS)] = TensorInfo(dtype, (*outer, 2 * blocks * size))
        elif tensor.dtype in _FP8 and not name.endswith(_FP8_SCALES):
            tensors[name] = TensorInfo(dtype, tensor.shape)
        elif not _is_scale(name, names):
            tensors[name] = tensor
    return replace(checkpoint, tensors=tensors, unpacked=True)


def _is_scale(name: str, names: Mapping[str, TensorInfo]) -> bool:
    if name.endswith(_BLOCK_SCALES) and name.removesuffix(_BLOCK_SCALES) + _BLOCKS in names:
        return True
    return any(name.endswith(end) and name.removesuffix(end) + ".weight" in names for end in _FP8_SCALES)
