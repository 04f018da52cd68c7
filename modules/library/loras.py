"""Which LoRAs there are, and what each is: read from adapter_config.json and the header of its weights."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.checkpoint import LORA_CONFIG, LORA_KINDS, LORA_PICKLE, LORA_WEIGHTS, read_json
from modules.errors import AdapterError, AdapterNotFound, BrokenCheckpoint
from modules.library.scan import HUB_CACHE, entries, free_name, snapshot_of
from modules.library.tensors import TensorInfo, safetensors_tensors
from modules.units import format_bytes

_MAX_NUMBER = 1e9
_KINDS: Mapping[str, str] = {
    **LORA_KINDS, "ADALORA": "AdaLoRA", "IA3": "IA³", "VERA": "VeRA", "OFT": "OFT", "BOFT": "BOFT",
    "RANDLORA": "RandLoRA", "XLORA": "X-LoRA",
    "PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix tuning",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """One LoRA on disk: its folder."""

    name: str
    path: Path
    root: Path


@dataclass(frozen=True)
class LoraFacts:
    """One LoRA, described. ``ranks``: each that occurs, the smallest first."""

    lora: Lora
    method: str  # peft's word: "LORA", "LOHA"
    kind: str  # in the field's words: "LoRA", "DoRA", "rsLoRA", "LoHa"
    ranks: tuple[int, ...]
    alpha: float
    target_modules: tuple[str, ...]  # as the configuration lists them, or its one pattern
    targets_by_pattern: bool
    modules_to_save: tuple[str, ...]
    base_model: str  # as the configuration names it: a name on the Hub, or a path of where it was trained
    size_bytes: int
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)

    @property
    def base_name(self) -> str:
        """The last part of :attr:`base_model`; ``""`` where it is not said."""
        return self.base_model.replace("\\", "/").rstrip("/").rpartition("/")[2]

    def summary(self) -> str:
        """``LoRA · rank 8 · alpha 16 · down_proj q_proj v_proj · 1.9 MB · for SmolLM2-135M``."""
        ranks = " to ".join(dict.fromkeys(str(rank) for rank in (self.ranks[:1] + self.ranks[-1:])))
        parts = [
            self.kind,
            f"rank {ranks}" if ranks else "",
            f"alpha {self.alpha:g}" if self.alpha else "",
            " ".join(self.target_modules),
            f"with {' '.join(self.modules_to_save)}" if self.modules_to_save else "",
            format_bytes(self.size_bytes),
            f"for {self.base_name}" if self.base_name else "",
        ]
        return " · ".join(part for part in parts if part)


class LoraLibrary:
    """The LoRAs under ``roots`` and in the Hugging Face cache. May be used from any thread."""

    def __init__(self, roots: Sequence[Path], hf_cache: Path | None = None) -> None:
        self.roots = tuple(Path(os.path.abspath(root)) for root in roots)
        self.hf_cache = hf_cache
        self._facts: dict[Path, tuple[object, LoraFacts]] = {}
        self._lock = threading.Lock()

    def loras(self) -> list[Lora]:
        """Every folder with an adapter_config.json, by name, whatever the case. Looks at the disk each time.

        The first to have a name keeps it; a later one is called ``name (folder of its root)``.
        """
        found: dict[str, Lora] = {}
        places = [(root.name, _under(root)) for root in self.roots]
        if self.hf_cache is not None:
            places.append((HUB_CACHE, _cached(self.hf_cache)))
        for place, loras in places:
            for lora in sorted(loras, key=lambda lora: lora.name):
                name = free_name(lora.name, place, found)
                found[name] = Lora(name, lora.path, lora.root)
        return sorted(found.values(), key=lambda lora: (lora.name.casefold(), lora.name))

    def find(self, name: str) -> Lora:
        """The LoRA of that name. Names are those of :meth:`loras` alone, so none leads out of the folders.

        Raises AdapterNotFound, and AdapterError for a folder of that name that is no LoRA.
        """
        known = {lora.name: lora for lora in self.loras()}
        if name in known:
            return known[name]
        self._refuse_other_things(name)
        by_case = {other.casefold(): other for other in known}
        near = [by_case[match] for match in difflib.get_close_matches(name.casefold(), by_case, n=3, cutoff=0.4)]
        places = ", ".join(str(root) for root in self.roots) or "no LoRA folder"
        raise AdapterNotFound(
            f"There is no LoRA {name!r} in {places}.", f"Did you mean {' or '.join(near)}?" if near else ""
        )

    def _refuse_other_things(self, name: str) -> None:
        """Raise for what lies under that very name in a root and is no LoRA."""
        for root in self.roots:
            if name in entries(str(root))[1]:
                raise AdapterError(
                    f"{name} holds no {LORA_CONFIG}.",
                    "A LoRA is a folder with this file and its weights, as peft saves it.",
                )

    def facts(self, lora: Lora | str) -> LoraFacts:
        """What the LoRA is; read again when its files have changed.

        Raises AdapterNotFound where it is gone, AdapterError where its files are damaged, unsafe or of no LoRA.
        """
        found = self.find(lora) if isinstance(lora, str) else lora
        identity = _identity(found)
        with self._lock:
            known = self._facts.get(found.path)
        if known and known[0] == identity and known[1].lora == found:
            return known[1]
        facts = read_lora(found)
        with self._lock:
            self._facts[found.path] = (identity, facts)
        return facts


def read_lora(lora: Lora) -> LoraFacts:
    """Describe the LoRA. Raises as :meth:`LoraLibrary.facts` does."""
    if not lora.path.is_dir():
        raise AdapterNotFound(f"{lora.name} is not there any more: {lora.path}.")
    try:
        config = read_json(lora.path / LORA_CONFIG)
        weights = _weights(lora)
        tensors = safetensors_tensors([weights])
        size = weights.stat().st_size
    except BrokenCheckpoint as error:
        raise AdapterError(f"The LoRA {lora.name} cannot be read: {error.message}") from None
    except OSError as error:
        raise AdapterError(
            f"The LoRA {lora.name} cannot be read: {error.strerror}.", "Check its permissions."
        ) from None
    method = str(config.get("peft_type") or "").upper()
    if not method or not tensors:
        raise AdapterError(
            f"{lora.name} is no LoRA: {'it holds no tensors' if method else f'its {LORA_CONFIG} names no peft_type'}."
        )
    return LoraFacts(
        lora=lora, method=method, kind=_kind(method, config), ranks=_ranks(method, config, tensors),
        alpha=_number(config.get("lora_alpha", config.get("alpha"))),
        target_modules=_words(config.get("target_modules")),
        targets_by_pattern=isinstance(config.get("target_modules"), str),
        modules_to_save=_words(config.get("modules_to_save")),
        base_model=_text(config.get("base_model_name_or_path")), size_bytes=size, config=config, tensors=tensors,
    )  # fmt: skip


def _weights(lora: Lora) -> Path:
    path = lora.path / LORA_WEIGHTS
    if path.is_file():
        return path
    if (lora.path / LORA_PICKLE).exists():
        raise AdapterError(
            f"The LoRA {lora.name} is a pickle ({LORA_PICKLE}), which may run code when it is opened.",
            "Get it as safetensors, from a source you trust.",
        )
    raise AdapterError(f"The LoRA {lora.name} lacks its weights: there is no {LORA_WEIGHTS}.")


def _kind(method: str, config: Mapping[str, Any]) -> str:
    if method != "LORA":
        return _KINDS.get(method, method)
    variants = [word for key, word in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key) is True]
    return " ".join(variants) or "LoRA"


def _ranks(method: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The ranks of the LoRA's own matrices; where it has none, the configuration's."""
    held = {t.shape[0] for name, t in tensors.items() if ".lora_A" in name and len(t.shape) == 2}
    held |= {t.shape[0] for name, t in tensors.items() if name.endswith("lora_embedding_A") and len(t.shape) == 2}
    if held:
        return tuple(sorted(held))
    rank = int(_number(config.get("r")))
    return (rank,) if rank else ()


def _number(value: object) -> float:
    """0 for what is no number, or NaN, or larger than any rank or alpha."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
        return 0.0
    return float(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(sorted(item for item in value if isinstance(item, str))) if isinstance(value, list) else ()


def _identity(lora: Lora) -> object:
    """What changes when the LoRA's files do."""
    try:
        stats = [(lora.path / name).stat() for name in (LORA_CONFIG, LORA_WEIGHTS)]
    except OSError:
        return object()  # equal to nothing: read anew
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


# --- where they lie ---


def _under(root: Path) -> Iterator[Lora]:
    """``root/name`` and ``root/name/inner``: an owner's folder, or the checkpoints of a training."""
    for name in entries(str(root))[1]:
        files, folders = entries(str(root / name))
        if LORA_CONFIG in files:
            yield Lora(name, root / name, root)
        for inner in folders:
            if LORA_CONFIG in entries(str(root / name / inner))[0]:
                yield Lora(f"{name}/{inner}", root / name / inner, root)


def _cached(hf_cache: Path) -> Iterator[Lora]:
    for repository in entries(str(hf_cache))[1]:
        snapshot = snapshot_of(hf_cache / repository) if repository.startswith("models--") else None
        if snapshot is not None and LORA_CONFIG in entries(str(snapshot))[0]:
            yield Lora(repository.removeprefix("models--").replace("--", "/", 1), snapshot, hf_cache)
