"""Which files of a repository are worth fetching: one whole set of weights, and all that is needed to use them."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.checkpoint import LORA_CONFIG, LORA_PICKLE, LORA_WEIGHTS, OTHER_WEIGHTS, safe_name
from modules.errors import NotOnHub, UserError

Kind = Literal["model", "lora"]
WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf")  # of the formats that are loaded
_INDEX = ".index.json"  # of weights in several files
_NOT_LOADED: Mapping[str, str] = {
    **OTHER_WEIGHTS, ".llamafile": "a llamafile", ".pkl": "a pickle", ".exe": "a program",
    ".zip": "an archive", ".gz": "an archive", ".tar": "an archive",
}  # fmt: skip
_TRAINING = re.compile(r"^(optimizer|scheduler|rng_state|trainer_state|training_args|scaler|random_states)[^/]*$")
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".pdf", ".ipynb"})
_VARIANT = re.compile(r"^(?:model|pytorch_model)[.-](fp16|fp32|bf16|f16|f32|int8|8bit|4bit|non_ema)(?=[.-])", re.I)
_STEM = re.compile(r"model|pytorch_model", re.I)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_LITERAL = re.compile(r"\[([\[*?])\]")  # a character of a name that would be a glob's otherwise
_GLOB = re.compile(r"[*?\[]")


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
    listed = _listed(offered, kind)
    reasons = {file.name: reason for file in offered if (reason := _needless(file.name, listed))}
    wanted = tuple(file for file in offered if file.name not in reasons)
    ggufs = [file for file in offered if file.name.endswith(".gguf")]
    plain = any(_is_weights(file.name) for file in wanted)
    if ggufs and not plain:
        return _one_gguf(ggufs, wanted, reasons, kind)
    if not plain:
        raise UserError(f"{repo} holds no weights that Loadstone loads.", "Look for it as safetensors or GGUF.")
    return Choice(kind, wanted, reasons)


def choose_again(repo: str, files: Sequence[RemoteFile], had: Collection[str], before: Sequence[RemoteFile]) -> Choice:
    """What to fetch of a newer commit's ``files`` for who has the files called ``had`` of the older one's, ``before``.

    What suits, where that is what suited then; otherwise the same files, and small ones that are new. ``before`` is
    empty where it is not known. Raises UnsafeCheckpoint as :func:`check_names`, NotOnHub where the weights are gone.
    """
    check_names(repo, files)
    suits, suited = _suiting(repo, files), _suiting(repo, before)
    if suits and suits.wanted and suited and {file.name for file in suited.wanted} == set(had):
        return suits
    there = {file.name for file in files}
    gone = [name for name in had if name not in there]
    if lost := [name for name in gone if name.endswith(WEIGHT_ENDINGS) or len(gone) == len(had)]:
        raise NotOnHub(f"{repo} has no {lost[0]} any more.", "Get the file list to see what there is.")
    known = {*had, *(file.name for file in before)}
    of_weights = (*WEIGHT_ENDINGS, _INDEX)
    new = {f.name for f in (suits.wanted if suits else ()) if f.name not in known and not f.name.endswith(of_weights)}
    if any(name.endswith(".gguf") for name in had):  # which needs nothing beside it
        new = set()
    return Choice(kind_of(files), tuple(file for file in files if file.name in new or file.name in had), {})


def _suiting(repo: str, files: Sequence[RemoteFile]) -> Choice | None:
    try:
        return choose(repo, files)
    except UserError:  # there are no weights
        return None


def kind_of(files: Iterable[RemoteFile]) -> Kind:
    """A LoRA where adapter weights lie beside their configuration."""
    names = {file.name for file in files}
    adapter = not names.isdisjoint({LORA_WEIGHTS, LORA_PICKLE})
    return "lora" if LORA_CONFIG in names and adapter else "model"


def _named(repo: str, files: Sequence[RemoteFile], pattern: str, kind: Kind) -> Choice:
    patterns = [part.strip() for part in pattern.split(",") if part.strip()]
    exact = {name for part in patterns if (name := _exactly(part))}
    globs = [part for part in patterns if not _exactly(part)]
    wanted = tuple(f for f in files if f.name in exact or any(fnmatch.fnmatchcase(f.name, part) for part in globs))
    if not wanted:
        near = [file.name for file in files if any(part.strip("*").lower() in file.name.lower() for part in patterns)]
        hint = f"Did you mean {' or '.join(near[:3])}?" if near else "Get the file list to see what there is."
        raise NotOnHub(f"{repo} has no file {pattern!r}.", hint)
    names = {file.name for file in wanted}
    return Choice(kind, wanted, {file.name: "not asked for" for file in files if file.name not in names})


def _exactly(pattern: str) -> str:
    """The one name that ``pattern`` names; "" for a glob. A page names thousands of files, each by a pattern."""
    return "" if _GLOB.search(_LITERAL.sub("", pattern)) else _LITERAL.sub(r"\1", pattern)


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


@dataclass(frozen=True)
class _Listed:
    """What the rules ask of a repository's whole list, found once: a list may have tens of thousands of files."""

    names: frozenset[str]
    kind: Kind
    has_safetensors: bool  # of the model itself
    first_precisions: frozenset[tuple[str, str]]  # (stem, ending) of names that tell of no second precision


def _listed(files: Sequence[RemoteFile], kind: Kind) -> _Listed:
    names = frozenset(file.name for file in files)
    stems = ((match[0], _ending(name)) for name in names if not _VARIANT.match(name) and (match := _STEM.match(name)))
    return _Listed(names, kind, any(_plain_safetensors(name) for name in names), frozenset(stems))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1]


def _needless(name: str, listed: _Listed) -> str:
    """Why the file is not worth fetching; "" where it is."""
    return next((reason for rule in _RULES if (reason := rule(name, listed))), "")


def _original(name: str, _listed: _Listed) -> str:
    return "the original format, a duplicate" if name.startswith(("original/", "consolidated", "metal/")) else ""


def _by_ending(name: str, _listed: _Listed) -> str:
    ending = _ending(name).lower()
    if ending in _PICTURES:
        return "not needed to load it"
    return f"{_NOT_LOADED[ending]}, which no loader takes" if ending in _NOT_LOADED else ""


def _training(name: str, _listed: _Listed) -> str:
    base = name.rpartition("/")[2]
    if name.startswith(("checkpoint-", "runs/", "logs/", "global_step")) or _TRAINING.match(base):
        return "left over from training"
    return ""


def _in_folder(name: str, _listed: _Listed) -> str:
    folder, _, base = name.rpartition("/")
    if folder and base.endswith((*WEIGHT_ENDINGS, _INDEX)):
        return f"weights of another part ({folder}/)"
    return ""


def _pickle(name: str, listed: _Listed) -> str:
    if not name.endswith((".bin", ".bin.index.json")):
        return ""
    if _of_adapter(name):
        return "a duplicate of the safetensors" if LORA_WEIGHTS in listed.names else ""
    return "a duplicate of the safetensors" if listed.has_safetensors else ""


def _variant(name: str, listed: _Listed) -> str:
    """A second precision, ``model.fp16.safetensors``, beside a first one."""
    if not (match := _VARIANT.match(name)):
        return ""
    first = (name[: match.start(1) - 1], _ending(name))
    return f"a second precision ({match[1]})" if first in listed.first_precisions else ""


def _gguf(name: str, listed: _Listed) -> str:
    if not name.endswith(".gguf"):
        return ""
    return "a duplicate of the safetensors" if listed.has_safetensors else "a GGUF file"


def _base_beside_adapter(name: str, listed: _Listed) -> str:
    """A LoRA's repository may hold the merged model too."""
    weights = name.endswith((".safetensors", ".bin", ".index.json")) and "/" not in name
    return "the merged model; the LoRA is enough" if listed.kind == "lora" and weights and not _of_adapter(name) else ""


def _single_beside_shards(name: str, listed: _Listed) -> str:
    """transformers takes the single file where there are both; the shards are the duplicate then."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        stem, _, ending = single.rpartition(".")
        shard = name.startswith(f"{stem}-") and name.endswith(ending) and _SHARD.search(name)
        if single in listed.names and (shard or name == f"{single}.index.json"):
            return f"a duplicate of {single}"
    return ""


def _of_adapter(name: str) -> bool:
    return name.startswith("adapter_")


def _plain_safetensors(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not _of_adapter(name) and not name.startswith("consol")


_RULES: tuple[Callable[[str, _Listed], str], ...] = (
    _original, _training, _by_ending, _in_folder, _base_beside_adapter, _pickle, _variant, _gguf,
    _single_beside_shards,
)  # fmt: skip
