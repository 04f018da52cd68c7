"""Reading the per-model settings of text-generation-webui (``models/config-user.yaml``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS, find

FILE_NAME = "config-user.yaml"
# Its names that are not ours: our name, and the value that stands for what it says.
_RENAMED: Mapping[str, str] = dict.fromkeys(("n_ctx", "max_seq_len", "truncation_length"), "ctx_size")
_SWITCHES: Mapping[str, tuple[str, Any]] = {
    "no_use_fast": ("use_fast", False),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "use_eager_attention": ("attn_implementation", "eager"),
}
_MEANINGLESS = frozenset({"loader", "model", "model_type"})  # what the loader is, is read from the files here
_NOT_TAKEN = frozenset({"trust_remote_code"})  # somebody must say yes to the very files
_LARGEST_GIB = 512  # it wrote MiB in some versions and GiB in others; a number above this was MiB


@dataclass(frozen=True)
class ImportPlan:
    """What an import would save: values by model; ``left_out``: what is not understood, in words."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def plan_import(file: Path, model_names: Sequence[str]) -> ImportPlan:
    """What ``file`` would give these models. Empty where there is no file; never raises for what it holds."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ImportPlan()
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ImportPlan(left_out=(f"{file.name} cannot be read.",))
    if not isinstance(data, Mapping):
        return ImportPlan()
    values: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for name in model_names:
        understood, unknown = _translated(_entry_for(data, name))
        if understood:
            values[name] = understood
        left_out += [f"{name}: {key}" for key in unknown]
    return ImportPlan(values, tuple(left_out))


def _entry_for(data: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """What all matching entries say, later ones over earlier ones."""
    merged: dict[str, Any] = {}
    for pattern, entry in data.items():
        if isinstance(entry, Mapping) and _matches(str(pattern), name):
            merged.update({str(key): value for key, value in entry.items()})
    return merged


def _matches(pattern: str, name: str) -> bool:
    """Its keys are regular expressions over the lower-case name, most a name with ``$``; it writes org_name."""
    forms = {name.lower(), name.lower().replace("/", "_")}
    try:
        return any(re.match(pattern.lower(), form) for form in forms)
    except (re.error, RecursionError):
        return pattern.removesuffix("$").lower() in forms


def _translated(entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our values from its keys, and the keys that are set and mean nothing here. Defaults are left out."""
    values: dict[str, Any] = {}
    unknown: list[str] = []
    gpu_keys = sorted((key for key in entry if re.fullmatch(r"gpu_memory_\d{1,3}", key)), key=_number_of)
    entry = _in_gib(entry, [*gpu_keys, "cpu_memory"])
    if any(entry[key] for key in gpu_keys):
        entry = {**entry, "gpu_memory": [entry[key] or 0 for key in gpu_keys]}
    for key, value in entry.items():
        if key in _MEANINGLESS or key in gpu_keys or value in (None, False, "", "None", 0):
            continue
        try:
            name, parsed = _parsed(key, value)
        except LoadstoneError:
            unknown.append(key)
            continue
        if parsed != LOAD_OPTIONS[name].default:
            values[name] = parsed
    if not values.get("load_in_4bit"):  # it always writes its own defaults for these, which would only be remarked on
        values = {name: value for name, value in values.items() if LOAD_OPTIONS[name].group != "4-bit"}
    return values, unknown


def _parsed(key: str, value: Any) -> tuple[str, Any]:
    """Our option and its value. Raises OptionError for what is not understood."""
    if key in _SWITCHES:
        return _SWITCHES[key]
    spec = find({} if key in _NOT_TAKEN else LOAD_OPTIONS, _RENAMED.get(key, key))
    return spec.name, spec.parse(value)


def _number_of(key: str) -> int:
    return int(key.rsplit("_", 1)[1])


def _in_gib(entry: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The entry with these sizes as GiB; they are all in one unit, which the largest one gives away."""
    sizes = {key: _number(entry[key]) for key in keys if key in entry}
    largest = max((size for size in sizes.values() if size is not None), default=0.0)
    if largest <= _LARGEST_GIB:
        return dict(entry)
    return {**entry, **{key: round(size / 1024, 3) for key, size in sizes.items() if size is not None}}


def _number(value: Any) -> float | None:
    try:
        number = float(value or 0)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
