"""What the ML libraries raise, as errors that say what to change. The one place that knows their words."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modules.errors import (
    BrokenCheckpoint,
    CustomCodeRefused,
    DiskFull,
    InternalError,
    LoadFailed,
    LoadstoneError,
    MissingPackage,
    OutOfMemory,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from modules.packages import install_line
from modules.protocol import LoadOrder

logger = logging.getLogger(__name__)

_GIB = 1024**3
_TOLD_S = 2.0  # until an error has reached whoever is answered
# What CUDA and its libraries say where they find no memory beside the allocator's: for a context, a kernel, a handle.
# What torch says where it has no CUDA, or the driver or the GPU is too old for its own.
_NO_CUDA = re.compile(
    r"not compiled with CUDA|no kernel image is available|NVIDIA driver|CUDA driver (version|initialization)"
)
_GPU_FULL = re.compile(r"(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory|CU\w+_STATUS_ALLOC_FAILED")


def translate(exc: BaseException, order: LoadOrder, *, loaded: bool = False) -> LoadstoneError:
    """The error of our tree for ``exc``, with the traceback as details; one of ours comes back as it is.

    ``loaded``: it is not the load that failed but the use of what is loaded. After an error of CUDA's own, other than
    want of memory, nothing works any more in the process: it ends, once the error has been told.
    """
    if isinstance(exc, LoadstoneError):
        return exc
    chain = list(_chain(exc))
    for rule in _RULES:
        for link in chain:
            if (error := rule(link, order)) is not None:
                return _with_traceback(error, exc)
    message = f"{order.name}: {type(exc).__name__}: {_first_line(exc)}"
    if loaded and any(isinstance(link, torch.AcceleratorError) for link in chain):
        logger.critical("%s. The process cannot use the GPU any more, and ends.", message)
        threading.Timer(_TOLD_S, os._exit, (1,)).start()
    return _with_traceback(InternalError(message) if loaded else LoadFailed(message), exc)


def _with_traceback(error: LoadstoneError, exc: BaseException) -> LoadstoneError:
    error.details = "".join(traceback.format_exception(exc))
    return error


def _chain(exc: BaseException | None) -> list[BaseException]:
    """The exception, then what it was raised from: libraries often hide the reason one or two links down."""
    found: list[BaseException] = []
    while exc is not None and exc not in found:
        found.append(exc)
        exc = exc.__cause__ or exc.__context__
    return found


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().split("\n")[0] or "no message"


def _out_of_memory(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    text = str(exc)
    ram = isinstance(exc, MemoryError) or "DefaultCPUAllocator: can't allocate" in text
    gpu = isinstance(exc, torch.OutOfMemoryError) or _GPU_FULL.search(text) is not None
    if not ram and not gpu:
        return None
    fix: dict[str, Any] = {}
    quantized = order.quantization or order.options.load_in_4bit
    if not quantized:
        fix = {"load_in_4bit": True, "load_in_8bit": False}
    wanted = _wanted_bytes(text)
    where = "RAM" if ram else "A GPU's memory"
    asked = f" when {wanted / _GIB:.2f} GiB more were needed" if wanted else ""
    hint = "Load in 4-bit, or choose a shorter context." if fix else "Choose a shorter context or a smaller model."
    return OutOfMemory(f"{where} ran out{asked} for {order.name}.", hint, fix=fix)


def _wanted_bytes(text: str) -> float:
    """The bytes that an allocator's message says it was asked for; 0 where it does not say."""
    if match := re.search(r"you tried to allocate (\d+) bytes", text):
        return float(match[1])
    if match := re.search(r"Tried to allocate ([\d.]+) (MiB|GiB)", text):
        return float(match[1]) * (_GIB if match[2] == "GiB" else 1024**2)
    return 0.0


def _gpu_unusable(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    if order.options.cpu or not isinstance(exc, RuntimeError | AssertionError) or not _NO_CUDA.search(str(exc)):
        return None
    return LoadFailed(
        f"torch {torch.__version__} cannot use the GPU for {order.name}: {_first_line(exc).rstrip('.')}.",
        "Install a driver, or a build of torch, that fits the GPU, leave it out with gpu-memory, or use the CPU alone.",
        fix={"cpu": True},
    )


def _does_not_fit(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    # bitsandbytes' quantizers, when the device map that max_memory led to puts layers beside the GPUs
    if not isinstance(exc, ValueError) or "Some modules are dispatched on the CPU or the disk" not in str(exc):
        return None
    fix: dict[str, Any] = {} if order.options.load_in_4bit else {"load_in_4bit": True, "load_in_8bit": False}
    return OutOfMemory(
        f"{order.name} does not fit in the memory it may take, and quantized layers cannot lie anywhere else.",
        "Raise gpu-memory or cpu-memory, load in 4-bit, or choose a smaller model.",
        fix=fix,
    )


def _no_space(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(exc):
        return DiskFull(f"The disk is full: {_first_line(exc)}.")
    return None


def _missing_package(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    if not isinstance(exc, ImportError):
        return None
    if isinstance(exc, ModuleNotFoundError) and exc.name:
        return MissingPackage(
            f"{order.name} needs the package {exc.name}.", f"Run: {install_line(exc.name.split('.')[0])}"
        )
    named = re.search(r"pip install ([\w\-\[\]=<>.,' ]*[\w\]])", str(exc))
    hint = f"Run: {install_line(named[1])}" if named else ""
    return MissingPackage(f"{order.name} needs a package: {_first_line(exc)}", hint)


def _unsafe(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    if not isinstance(exc, pickle.UnpicklingError):
        return None
    if match := re.search(r"(?:GLOBAL|global|function|class) ([\w.]+)", str(exc)):
        return UnsafeCheckpoint(f"{order.name} holds a pickle that would run code when opened: {match[1]}.")
    if "weights_only" in str(exc) or "Weights only" in str(exc):
        return UnsafeCheckpoint(f"{order.name} holds a pickle with more than tensors in it.")
    return BrokenCheckpoint(f"The weights of {order.name} cannot be read: {_first_line(exc)}.")


def _custom_code(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    words = ("trust_remote_code", "contains custom code", "references custom code")
    if order.custom_code_allowed or not isinstance(exc, ValueError) or not any(word in str(exc) for word in words):
        return None
    files = ", ".join(sorted(file.name for file in Path(order.path).glob("*.py"))) or "no .py file in its folder"
    return CustomCodeRefused(f"{order.name} brings Python code of its own, which nobody allowed to run: {files}.")


def _unsupported(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    text = str(exc)
    if match := re.search(r"model type `([^`]+)` but Transformers does not recognize", text):
        return UnsupportedModel(f"{order.name} is of type {match[1]!r}, which this transformers does not know.")
    if "Unrecognized configuration class" in text or "Unrecognized model in" in text:
        return UnsupportedModel(f"{order.name} is no language model that transformers can load: {_first_line(exc)}")
    if match := re.search(r"GGUF model with architecture (\S+) is not supported", text):
        return UnsupportedModel(f"{order.name} is a GGUF file of architecture {match[1]}, which transformers lacks.")
    if match := re.search(r"does not support an attention implementation|does not support Flash Attention", text):
        return UnsupportedModel(f"{order.name}: {_first_line(exc)}", fix={"attn_implementation": "auto"})
    return None


def _broken(exc: BaseException, order: LoadOrder) -> LoadstoneError | None:
    text = str(exc)
    if isinstance(exc, SafetensorError) or "PytorchStreamReader failed" in text or isinstance(exc, EOFError):
        return BrokenCheckpoint(f"The weights of {order.name} cannot be read: {_first_line(exc)}.")
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        return BrokenCheckpoint(
            f"The weights of {order.name} have other shapes than its config.json says: {_first_line(exc)}."
        )
    if "instantiate the backend tokenizer" in text or "Can't load tokenizer" in text:
        return BrokenCheckpoint(f"The tokenizer files of {order.name} are missing or cannot be read.")
    if "is not a valid JSON file" in text:
        return BrokenCheckpoint(f"{order.name}: {_first_line(exc)}")
    return None


_RULES: tuple[Callable[[BaseException, LoadOrder], LoadstoneError | None], ...] = (
    _out_of_memory,
    _gpu_unusable,
    _does_not_fit,
    _no_space,
    _custom_code,
    _missing_package,
    _unsafe,
    _unsupported,
    _broken,
)
