"""Which files of a repository are worth fetching: one whole set of weights, and all that is needed to use them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.checkpoint import safe_name
from modules.errors import NotOnHub, UserError

Kind = Literal["model", "lora"]
LORA_CONFIG = "adapter_config.json"
_OTHER_WEIGHTS: Mapping[str, str] = {
    ".h5": "TensorFlow weights", ".msgpack": "Flax weights", ".onnx": "ONNX weights", ".onnx_data": "ONNX weights",
    ".pth": "the original PyTorch weights", ".pt": "PyTorch weights", ".ckpt": "a training checkpoint",
    ".ot": "Rust weights", ".tflite": "TensorFlow Lite weights", ".mlmodel": "Core ML weights", ".npz": "MLX weights",
    ".mlpackage": "Core ML weights", ".nemo": "NeMo weights", ".llamafile": "a llamafile", ".pkl": "a pickle",
    ".exe": "a program", ".zip": "an archive", ".gz": "an archive", ".tar": "an archive",
}  # fmt: skip
_TRAINING = re.compile(r"^(optimizer|scheduler|rng_state|trainer_state|training_args|scaler|random_states)[^/]*$")
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".pdf", ".ipynb"})
_VARIANT = re.compile(r"^(?:model|pytorch_model)[.-](fp16|fp32|bf16|f16|f32|int8|8bit|4bit|non_ema)(?=[.-])", re.I)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. ``sha256`` where the Hub keeps it in LFS, else ``blob``, git's SHA-1 of it."""

    name: str
    size: int
    sha256: str = ""
    blob: str = ""

    @property
    def hash(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Choice:
    """``left_out``: name → why. ``question``: what has to be chosen before anything can be fetched."""

    kind: Kind
    wanted: tuple[RemoteFile, ...]
    left_out: Mapping[str, str]
    question: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.wanted)


def check_names(repo: str, files: Iterable[RemoteFile]) -> None:
    """Raises UnsafeCheckpoint for a name that would leave the folder it is put into."""
    for file in files:
        safe_name(Path(repo), "The Hub's list of files", file.name)


def choose(repo: str, files: Sequence[RemoteFile], pattern: str = "") -> Choice:
    """What to fetch of ``files``: those that ``pattern`` (names or globs, set apart by commas) names, or what suits.

    Raises UnsafeCheckpoint as :func:`check_names`, NotOnHub where nothing is called so, UserError for no model.
    """
    check_names(repo, files)
    offered = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    kind = kind_of(offered)
    if pattern:
        return _named(repo, offered, pattern, kind)
    reasons = {file.name: reason for file in offered if (reason := _needless(file, offered, kind))}
    wanted = tuple(file for file in offered if file.name not in reasons)
    ggufs = [file for file in offered if file.name.endswith(".gguf")]
    plain = any(_is_weights(file.name) for file in wanted)
    if ggufs and not plain:
        return _one_gguf(ggufs, wanted, reasons, kind)
    if not plain:
        raise UserError(f"{repo} holds no weights that Loadstone loads.", "Look for it as safetensors or GGUF.")
    return Choice(kind, wanted, reasons)


def kind_of(files: Iterable[RemoteFile]) -> Kind:
    """A LoRA where adapter weights lie beside their configuration."""
    names = {file.name for file in files}
    adapter = not names.isdisjoint({"adapter_model.safetensors", "adapter_model.bin"})
    return "lora" if LORA_CONFIG in names and adapter else "model"


def _named(repo: str, files: Sequence[RemoteFile], pattern: str, kind: Kind) -> Choice:
    patterns = [part.strip() for part in pattern.split(",") if part.strip()]
    wanted = tuple(file for file in files if any(fnmatch.fnmatchcase(file.name, part) for part in patterns))
    if not wanted:
        near = [file.name for file in files if any(part.strip("*").lower() in file.name.lower() for part in patterns)]
        hint = f"Did you mean {' or '.join(near[:3])}?" if near else "Get the file list to see what there is."
        raise NotOnHub(f"{repo} has no file {pattern!r}.", hint)
    return Choice(kind, wanted, {file.name: "not asked for" for file in files if file not in wanted})


def _one_gguf(
    ggufs: Sequence[RemoteFile], wanted: Sequence[RemoteFile], reasons: Mapping[str, str], kind: Kind
) -> Choice:
    """A repository of GGUF files holds the same model many times: one is asked for, unless there is but one."""
    models = [file for file in ggufs if not file.name.rpartition("/")[2].lower().startswith("mmproj")]
    if len(models) == 1:
        kept = {name: why for name, why in reasons.items() if name != models[0].name}
        return Choice(kind, tuple(file for file in (*models, *wanted) if _beside_gguf(file, models[0])), kept)
    names = ", ".join(file.name for file in models[:3])
    question = f"It holds {len(models)} GGUF files, each the whole model. Choose one, such as {names}."
    return Choice(kind, (), {**reasons, **{file.name: "one GGUF file is enough" for file in models}}, question)


def _beside_gguf(file: RemoteFile, model: RemoteFile) -> bool:
    return file is model or not file.name.endswith(".gguf")


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".bin")) and not _TRAINING.match(name)


def _needless(file: RemoteFile, files: Sequence[RemoteFile], kind: Kind) -> str:
    """Why ``file`` is not worth fetching; "" where it is."""
    for rule in _RULES:
        if reason := rule(file.name, {other.name for other in files}, kind):
            return reason
    return ""


def _original(name: str, _names: set[str], _kind: Kind) -> str:
    return "the original format, a duplicate" if name.startswith(("original/", "consolidated", "metal/")) else ""


def _by_ending(name: str, _names: set[str], _kind: Kind) -> str:
    ending = Path(name).suffix.lower()
    if ending in _PICTURES:
        return "not needed to load it"
    return f"{_OTHER_WEIGHTS[ending]}, which no loader takes" if ending in _OTHER_WEIGHTS else ""


def _training(name: str, _names: set[str], _kind: Kind) -> str:
    base = name.rpartition("/")[2]
    if name.startswith(("checkpoint-", "runs/", "logs/", "global_step")) or _TRAINING.match(base):
        return "left over from training"
    return ""


def _in_folder(name: str, _names: set[str], _kind: Kind) -> str:
    folder, _, base = name.rpartition("/")
    if folder and base.endswith((".safetensors", ".bin", ".gguf", ".index.json")):
        return f"weights of another part ({folder}/)"
    return ""


def _pickle(name: str, names: set[str], _kind: Kind) -> str:
    if not name.endswith((".bin", ".bin.index.json")):
        return ""
    if _of_adapter(name):
        return "a duplicate of the safetensors" if "adapter_model.safetensors" in names else ""
    return "a duplicate of the safetensors" if any(_plain_safetensors(other) for other in names) else ""


def _variant(name: str, names: set[str], _kind: Kind) -> str:
    """A second precision, ``model.fp16.safetensors``, beside a first one."""
    if not (match := _VARIANT.match(name)):
        return ""
    stem = name.split(match[1])[0].rstrip(".-")
    others = [o for o in names if o.startswith(stem) and not _VARIANT.match(o) and o.endswith(Path(name).suffix)]
    return f"a second precision ({match[1]})" if others else ""


def _gguf(name: str, names: set[str], _kind: Kind) -> str:
    if not name.endswith(".gguf"):
        return ""
    return "a duplicate of the safetensors" if any(_plain_safetensors(other) for other in names) else "a GGUF file"


def _base_beside_adapter(name: str, names: set[str], kind: Kind) -> str:
    """A LoRA's repository may hold the merged model too."""
    weights = name.endswith((".safetensors", ".bin", ".index.json")) and "/" not in name
    return "the merged model; the LoRA is enough" if kind == "lora" and weights and not _of_adapter(name) else ""


def _single_beside_shards(name: str, names: set[str], _kind: Kind) -> str:
    """transformers takes the single file where there are both; the shards are the duplicate then."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        stem, _, ending = single.rpartition(".")
        shard = name.startswith(f"{stem}-") and name.endswith(ending) and _SHARD.search(name)
        if single in names and (shard or name == f"{single}.index.json"):
            return f"a duplicate of {single}"
    return ""


def _of_adapter(name: str) -> bool:
    return name.startswith("adapter_")


def _plain_safetensors(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not _of_adapter(name) and not name.startswith("consol")


_RULES: tuple[Callable[[str, set[str], Kind], str], ...] = (
    _original, _training, _by_ending, _in_folder, _base_beside_adapter, _pickle, _variant, _gguf,
    _single_beside_shards,
)  # fmt: skip
