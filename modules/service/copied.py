"""Whether a load will read a quantized copy, by the identity that the worker gives to copies, without ML packages.

What is not known here: whether the copy is whole, and whether the model will run code of its own: such are not copied.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from modules import copies, packages
from modules.checkpoint import identity_of
from modules.errors import LoadstoneError
from modules.options import LoadOptions
from modules.planner import Plan


def reads_copy(plan: Plan, options: LoadOptions, cache_dir: Path) -> bool:
    """Whether there is a copy under ``cache_dir`` that the planned load will take."""
    device = _device(plan)
    if not plan.precision.quantization or not plan.path or not device:
        return False
    source, recipe = Path(plan.path).resolve(), {"dtype": f"torch.{plan.precision.dtype}", "device": device}
    what = copies.in_words(options.load_in_8bit, options.quant_type, options.use_double_quant)
    alike = [
        copy for copy in copies.copies(cache_dir)
        if copy.identity.get("source") == str(source) and copy.what == what and _is_made_so(copy.identity, recipe)
    ]  # fmt: skip
    files = _files(source, plan.file_format) if alike else None
    return files is not None and any(copy.identity.get("files") == files for copy in alike)


def _device(plan: Plan) -> str:
    """The kind of device that the whole model lies on; "" where there are several."""
    kinds = {"gpu" if place.isdigit() else place for place in plan.device_map.values()}
    return next(iter(kinds)) if len(kinds) == 1 else ""


def _is_made_so(identity: Mapping[str, Any], recipe: Mapping[str, str]) -> bool:
    """Whether a copy was made by this version, with what is installed, and with all of ``recipe``."""
    made, versions = identity.get("recipe", {}), identity.get("versions", {})
    return (
        identity.get("layout") == copies.LAYOUT
        and all(made.get(name) == value for name, value in recipe.items())
        and not made.get("llm_int8_enable_fp32_cpu_offload")  # of a load without a plan
        and all(_release(version) == _release(packages.version(name)) for name, version in versions.items())
    )


def _release(version: str) -> str:
    """Without what follows the plus sign: torch's own version names its build there, pip's may not."""
    return version.split("+")[0]


def _files(source: Path, file_format: str) -> list[list[Any]] | None:
    """What tells the model's files from others; None where they cannot be read."""
    try:
        with os.scandir(source) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
        return _files_at(source, file_format, tuple(sorted((n, s.st_size, s.st_mtime_ns) for n, s in stats)))
    except (OSError, LoadstoneError):
        return None


@lru_cache(maxsize=8)
def _files_at(source: Path, file_format: str, stamp: tuple[tuple[str, int, int], ...]) -> list[list[Any]]:
    """Reading every header takes a while for a model of many shards: once while its files (``stamp``) stay."""
    return identity_of(source, file_format)
