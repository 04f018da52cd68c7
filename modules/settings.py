"""Settings files, and the layers of explicitly set values that become one options object."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import yaml

from modules.errors import LoadstoneError, SettingsError
from modules.options import COMMAND_OPTIONS, GENERATION_OPTIONS, LOAD_OPTIONS, SERVER_OPTIONS, LoadOptions, Spec, find
from modules.options.loader import EXCLUSIVE

T = TypeVar("T")
_CODE_VERSION = 1
# Names of text-generation-webui's settings that differ from ours: (our name, what its value becomes).
_LEGACY = {"n_ctx": "ctx_size", "max_seq_len": "ctx_size", "truncation_length": "ctx_size"}


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """The options, and for each the name of the layer that its value came from ("default": the table)."""

    options: T
    origin: dict[str, str]


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved[LoadOptions]:
    """Lay the layers over the table's defaults, the last one on top. Raises OptionError.

    Where a layer turns on one of two options that exclude each other, the other one, if a lower layer turned
    it on, goes off: a person who ticks 4-bit means instead of the saved 8-bit. Within one layer it stays a
    contradiction, which :func:`modules.options.check` refuses.
    """
    values: dict[str, Any] = {}
    origin = dict.fromkeys(LOAD_OPTIONS, "default")
    for layer, given in layers:
        parsed = {(spec := find(LOAD_OPTIONS, name)).name: spec.parse(value) for name, value in given.items()}
        for one, other, _ in EXCLUSIVE:
            for winner, loser in ((one, other), (other, one)):
                if _on(parsed, winner) and loser not in parsed and _on(values, loser):
                    del values[loser]
                    origin[loser] = "default"
        values.update(parsed)
        origin.update(dict.fromkeys(parsed, layer))
    return Resolved(LoadOptions(**values), origin)


def _on(values: Mapping[str, Any], name: str) -> bool:
    return name in values and values[name] != LOAD_OPTIONS[name].default


class CodeFileLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class ImportPlan:
    """What an import would save: values by model; ``left_out``: what is not understood, in words."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Settings:
    """settings.yaml and the saved settings of each model. Reading the first raises SettingsError."""

    def __init__(self, file: Path, saved_dir: Path) -> None:
        self.file = file
        self.saved_dir = saved_dir
        values = read_values(file, {**LOAD_OPTIONS, **GENERATION_OPTIONS, **SERVER_OPTIONS, **COMMAND_OPTIONS})
        self.load_values = {name: value for name, value in values.items() if name in LOAD_OPTIONS}
        self.generation_values = {name: value for name, value in values.items() if name in GENERATION_OPTIONS}
        self.server_values = {name: value for name, value in values.items() if name in SERVER_OPTIONS}

    def path_of(self, model_name: str) -> Path:
        """The file with this model's saved settings; a name never leaves the folder."""
        plain = model_name.replace("/", "--").replace("\\", "--").lstrip(".")
        return self.saved_dir / f"{plain}.yaml"

    def saved(self, model_name: str) -> tuple[dict[str, Any], str]:
        """The values saved for the model, and a warning: a file that is broken is named, kept and ignored."""
        try:
            return read_values(self.path_of(model_name), LOAD_OPTIONS), ""
        except SettingsError as error:
            return {}, f"The saved settings are ignored: {error.message}"

    def save(self, model_name: str, values: Mapping[str, Any]) -> Path:
        """Write the values for this model, whole or not at all; the file. Nothing to keep removes the file."""
        path = self.path_of(model_name)
        parsed = {(spec := find(LOAD_OPTIONS, name)).name: spec.parse(value) for name, value in values.items()}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in parsed.items()}
        write_whole(path, yaml.safe_dump(plain, sort_keys=False) if plain else "{}\n")
        return path

    def forget(self, model_name: str) -> None:
        self.path_of(model_name).unlink(missing_ok=True)

    # --- import ---

    def importable(self, model_names: Sequence[str]) -> ImportPlan:
        """What text-generation-webui's config-user.yaml in the folder would give models that have nothing saved."""
        try:
            data = yaml.safe_load((self.saved_dir / "config-user.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return ImportPlan()
        if not isinstance(data, Mapping):
            return ImportPlan()
        values, left_out = {}, []
        for name in model_names:
            if self.path_of(name).exists():
                continue
            merged: dict[str, Any] = {}
            for pattern, entry in data.items():
                if isinstance(entry, Mapping) and _matches(str(pattern), name):
                    merged.update(entry)
            understood, unknown = _from_legacy(merged)
            if understood:
                values[name] = understood
            left_out += [f"{name}: {key}" for key in unknown]
        return ImportPlan(values, tuple(left_out))

    def import_legacy(self, plan: ImportPlan) -> None:
        """Save what the plan holds. A file that appeared meanwhile is not overwritten."""
        for name, values in plan.values.items():
            if not self.path_of(name).exists():
                self.save(name, values)


def _matches(pattern: str, name: str) -> bool:
    """Its keys are regular expressions over the lower-case name; most are a name with ``$``."""
    try:
        return re.match(pattern.lower(), name.lower()) is not None
    except re.error:
        return pattern.rstrip("$").lower() == name.lower()


def _from_legacy(entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our values from its keys, and the keys that mean nothing here. Defaults are left out."""
    values: dict[str, Any] = {}
    unknown: list[str] = []
    gpu = {key: entry[key] for key in sorted(entry) if re.fullmatch(r"gpu_memory_\d+", str(key))}
    if any(gpu.values()):
        values["gpu_memory"] = [float(value or 0) / (1024 if float(value or 0) > 512 else 1) for value in gpu.values()]
    for key, value in entry.items():
        if key in gpu or key in ("loader", "model"):
            continue
        if key in ("no_use_fast", "use_flash_attention_2"):
            if value:
                values.update(
                    {"use_fast": False} if key == "no_use_fast" else {"attn_implementation": "flash_attention_2"}
                )
            continue
        name = _LEGACY.get(str(key), str(key))
        try:
            parsed = find(LOAD_OPTIONS, name).parse(value)
        except LoadstoneError:
            unknown.append(str(key))
            continue
        if parsed != LOAD_OPTIONS[name].default:
            values[name] = parsed
    return values, unknown


# --- files ---


def read_values(path: Path, table: Mapping[str, Spec]) -> dict[str, Any]:
    """The option values of a YAML file, parsed; empty where there is no file. Raises SettingsError with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path.name} cannot be read: {error}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path.name} is not YAML: {' '.join(str(error).split())}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{path.name} must hold lines of the form name: value.")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    values = {}
    for name, value in data.items():
        try:
            spec = find(table, str(name))
            values[spec.name] = spec.parse(value)
        except LoadstoneError as error:
            raise SettingsError(f"{path.name}, line {lines.get(str(name), 0)}: {error.message}", error.hint) from None
    return values


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class CodeApprovals:
    """Which Python files of which model may run: exactly those that somebody has said yes to."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def allowed(self, model_name: str, code_files: Sequence[CodeFileLike]) -> bool:
        """Whether these very files were allowed. Changed, added or removed ones ask again."""
        return bool(code_files) and self._read().get(model_name) == {file.name: file.sha256 for file in code_files}

    def allow(self, model_name: str, code_files: Sequence[CodeFileLike]) -> None:
        models = {**self._read(), model_name: {file.name: file.sha256 for file in code_files}}
        write_whole(self._file, json.dumps({"version": _CODE_VERSION, "models": models}, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(data["models"]) if data.get("version") == _CODE_VERSION else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
