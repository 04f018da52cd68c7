"""Settings files, and the layers of explicitly set values that become one options object."""

from __future__ import annotations

import errno
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import yaml

from modules.errors import CustomCodeRefused, DiskFull, LoadstoneError, SettingsError
from modules.options import (
    GENERATION_OPTIONS,
    LOAD_OPTIONS,
    PRECISIONS,
    SERVER_OPTIONS,
    LoadOptions,
    Spec,
    find,
    parse_values,
)
from modules.options.loader import EXCLUSIVE
from modules.settings.legacy import FILE_NAME as LEGACY_FILE_NAME
from modules.settings.legacy import ImportPlan, plan_import

__all__ = [
    "CodeApprovals",
    "ImportPlan",
    "Resolved",
    "Settings",
    "contradicting",
    "read_values",
    "resolve",
    "write_whole",
]

T = TypeVar("T")
_CODE_VERSION = 1
_FLAGS_ONLY = ("model", "home", "settings")  # they say what to load, or where settings.yaml lies
# What settings.yaml may hold.
FILE_OPTIONS: Mapping[str, Spec] = {
    name: spec
    for name, spec in {**LOAD_OPTIONS, **GENERATION_OPTIONS, **SERVER_OPTIONS}.items()
    if name not in _FLAGS_ONLY
}


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """The options, and for each the name of the layer that its value came from ("default": the table)."""

    options: T
    origin: dict[str, str]


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved[LoadOptions]:
    """Lay the layers over the table's defaults, the last one on top. Raises OptionError.

    Where a layer turns on one of two options that exclude each other, the other one, if a lower layer turned
    it on, goes off: a person who ticks 4-bit means instead of the saved 8-bit. The same goes for the states of
    the one control of precision. Within one layer it stays a contradiction, which
    :func:`modules.options.check` refuses.
    """
    values: dict[str, Any] = {}
    origin = dict.fromkeys(LOAD_OPTIONS, "default")
    for layer, given in layers:
        parsed = parse_values(LOAD_OPTIONS, given)
        for winner, loser in _alternatives():
            if _on(parsed, winner) and loser not in parsed and _on(values, loser):
                del values[loser]
                origin[loser] = "default"
        values.update(parsed)
        origin.update(dict.fromkeys(parsed, layer))
    return Resolved(LoadOptions(**values), origin)


def contradicting(given: Mapping[str, Any]) -> frozenset[str]:
    """Of the parsed values of one layer the names of those that are turned on beside an alternative of theirs."""
    return frozenset(one for one, other in _alternatives() if _on(given, one) and _on(given, other))


def _alternatives() -> Iterator[tuple[str, str]]:
    """Each pair of options of which a person wants one, both ways round."""
    for one, other, _ in EXCLUSIVE:
        yield from ((one, other), (other, one))
    precisions = {name for values in PRECISIONS.values() for name in values}
    yield from itertools.permutations(sorted(precisions), 2)


def _on(values: Mapping[str, Any], name: str) -> bool:
    return name in values and values[name] != LOAD_OPTIONS[name].default


class CodeFileLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


class Settings:
    """settings.yaml and the saved settings of each model. Reading the first raises SettingsError."""

    def __init__(self, file: Path, saved_dir: Path) -> None:
        self.file = file
        self.saved_dir = saved_dir
        values = read_values(file, FILE_OPTIONS)
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
        """Write the values for this model, whole or not at all; the file. Raises OptionError, DiskFull, SettingsError.

        Nothing to keep leaves a file too: it says that there is nothing to import for this model.
        """
        path = self.path_of(model_name)
        parsed = parse_values(LOAD_OPTIONS, values)
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in parsed.items()}
        write_whole(path, yaml.safe_dump(plain, sort_keys=False) if plain else "{}\n")
        return path

    def forget(self, model_name: str) -> None:
        self.path_of(model_name).unlink(missing_ok=True)

    # --- import ---

    def importable(self, model_names: Sequence[str]) -> ImportPlan:
        """What text-generation-webui's config-user.yaml in the folder would give models that have nothing saved."""
        fresh = [name for name in model_names if not self.path_of(name).exists()]
        return plan_import(self.saved_dir / LEGACY_FILE_NAME, fresh)

    def import_legacy(self, plan: ImportPlan) -> None:
        """Save what the plan holds. A file that appeared meanwhile is not overwritten."""
        for name, values in plan.values.items():
            if not self.path_of(name).exists():
                self.save(name, values)


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise SettingsError(f"{path.name} is not YAML: {' '.join(str(error).split())}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{path.name} must hold lines of the form name: value.")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path.name}, line {lines.get(str(key), 1)}"
        if key in _FLAGS_ONLY and key not in table:
            raise SettingsError(f"{where}: {key} can only be given on the command line.", "Remove the line.")
        try:
            spec = find(table, str(key))
            parsed = spec.parse(value)
        except LoadstoneError as error:
            raise SettingsError(f"{where}: {error.message}", error.hint) from None
        if spec.name in values:  # load-in-4bit and load_in_4bit
            raise SettingsError(f"{where}: {key} is set twice.", "Remove one of the two lines.")
        values[spec.name] = parsed
    return values


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole.

    Raises DiskFull, or SettingsError where the folder cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"There is no space to write {path.name}.") from None
        raise SettingsError(f"{path.name} cannot be written: {error.strerror}.", "Check the permissions.") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


class CodeApprovals:
    """Which Python files of which model may run: exactly those that somebody has said yes to."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()  # two yeses at a time: neither is lost

    def allowed(self, model_name: str, code_files: Sequence[CodeFileLike]) -> bool:
        """Whether these very files were allowed. Changed, added or removed ones ask again."""
        return _all_seen(code_files) and self._read().get(model_name) == _hashes(code_files)

    def allow(self, model_name: str, code_files: Sequence[CodeFileLike]) -> None:
        """Keep the yes. Raises CustomCodeRefused for code that lies in another repository: it may change."""
        if foreign := [file.name for file in code_files if not file.sha256]:
            raise CustomCodeRefused(
                f"{model_name} runs code that is not in its folder: {', '.join(foreign)}.",
                "Put that code into the model's folder, and mend auto_map in its files.",
            )
        with self._lock:
            self._write({**self._read(), model_name: _hashes(code_files)})

    def forget(self, model_name: str) -> None:
        """Take the yes back: its code asks again. Raises DiskFull, SettingsError."""
        with self._lock:
            if model_name in (models := self._read()):
                self._write({name: hashes for name, hashes in models.items() if name != model_name})

    def _write(self, models: Mapping[str, Any]) -> None:
        write_whole(self._file, json.dumps({"version": _CODE_VERSION, "models": models}, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(data["models"]) if data.get("version") == _CODE_VERSION else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def _hashes(code_files: Sequence[CodeFileLike]) -> dict[str, str]:
    return {file.name: file.sha256 for file in code_files}


def _all_seen(code_files: Sequence[CodeFileLike]) -> bool:
    return bool(code_files) and all(file.sha256 for file in code_files)
