"""What bitsandbytes made of a model, kept: a later load with the same recipe reads it instead of quantizing again.

Copies are written before the model is used: on a CPU the first forward repacks 4-bit weights into a form that is not
the checkpoint's (bitsandbytes 0.50). Writing takes a few per cent of what quantizing took. What does not change the
weights (context, RoPE, attention, the type in which layers compute) is not part of a copy's identity, and is taken
from the order at each load; the same holds for everything in config.json and generation_config.json.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from transformers import GenerationConfig

from modules import copies
from modules.checkpoint import SETTINGS_FILES, identity_of
from modules.errors import BrokenCheckpoint, LoadstoneError, OutOfMemory
from modules.protocol import LoadOrder, Progress
from modules.units import format_bytes
from modules.worker import quantization, report
from modules.worker.counting import counting
from modules.worker.failures import translate

logger = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 30  # of free disk that a copy leaves, beside its own size
_MB = 10**6
_SHARD = "1GB"  # at most so much is gathered from a GPU at a time, and several files are checked at a time
# The part of BitsAndBytesConfig that changes how layers compute and not what they hold.
_NOT_IN_THE_WEIGHTS = ("bnb_4bit_compute_dtype",)

Kwargs: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[Kwargs, str], tuple[Any, tuple[str, ...]]]
Report: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True)
class Place:
    """Where the copy for one order lies, or will lie."""

    cache_dir: Path
    identity: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return copies.folder_of(self.cache_dir) / copies.key_of(self.identity)


@dataclass(frozen=True)
class Read:
    """A model and the kwargs that it was made with."""

    model: Any
    kwargs: Kwargs
    notes: tuple[str, ...]
    from_copy: bool = False


def load(order: LoadOrder, kwargs: Kwargs, make: Make, progress: Report) -> Read:
    """The model, from its copy if there is one, which is kept otherwise.

    ``make(kwargs, stage)`` calls from_pretrained, checks the result and returns it with notes; ``stage`` "" is the
    usual one. What it raises for the model's own files is raised here.
    """
    place = place_of(order, kwargs)
    if place is None:
        model, notes = make(kwargs, "")
        return Read(model, kwargs, (*notes, *why_none(order, kwargs)))
    copies.remove_leftovers(place.cache_dir)
    remove_stale(order, place)
    if (found := whole(place, progress)) is not None:
        read = _read(order, kwargs, found, make)
        if not isinstance(read, LoadstoneError):
            return read
        _discard(found.path, read)
    model, notes = make(kwargs, "")
    return Read(model, kwargs, (*notes, *keep(model, order, place, progress)))


def _read(order: LoadOrder, kwargs: Kwargs, found: copies.QuantizedCopy, make: Make) -> Read | LoadstoneError:
    """The model from its copy, or why the copy is of no use. Raises OutOfMemory: quantizing would need more still."""
    note = f"Loaded from the quantized copy of {found.made:%Y-%m-%d %H:%M} ({format_bytes(found.size_bytes)})."
    try:
        used = copy_kwargs(kwargs, found.path)
        model, notes = make(used, "loading the quantized copy")
        return Read(model, used, (note, *notes), from_copy=True)
    except Exception as exc:
        problem = translate(exc, order)
        if isinstance(problem, OutOfMemory):
            raise problem from exc
    gc.collect()  # what was loaded of it so far
    return problem


# --- which copy ---


def place_of(order: LoadOrder, kwargs: Mapping[str, Any]) -> Place | None:
    """Where the copy for this order belongs; None where none is wanted, or none is possible."""
    device = _device(kwargs)
    if not _wanted(order) or _runs_own_code(order, kwargs) or device is None:
        return None
    return Place(Path(order.cache_dir), identity(order, kwargs, device))


def why_none(order: LoadOrder, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """A note for a model that is quantized at each load though copies are wanted."""
    if not _wanted(order):
        return ()
    if _runs_own_code(order, kwargs):
        return ("The model is quantized at each load: one that runs code of its own is not kept quantized, since that "
                "code would have to be kept with it.",)  # fmt: skip
    return ("The model is quantized at each load: what is quantized depends on which layers lie in RAM or on disk "
            "beside a GPU, so the result is not kept.",)  # fmt: skip


def _wanted(order: LoadOrder) -> bool:
    return order.quantized_cache and quantization.on_the_fly(order.options) and order.file_format != "gguf"


def _runs_own_code(order: LoadOrder, kwargs: Mapping[str, Any]) -> bool:
    return order.custom_code_allowed and bool(getattr(kwargs["config"], "auto_map", None))


def _device(kwargs: Mapping[str, Any]) -> str | None:
    """The type of the devices that the model goes to; None where a part may lie beside the GPUs.

    Several GPUs are as one: each tensor is quantized, written and read by itself, on the GPU where it lies.
    """
    places = kwargs["device_map"]
    names = {str(place) for place in (kwargs["max_memory"] if places == "auto" else places.values())}
    if not names or "disk" in names or ("cpu" in names and len(names) > 1):
        return None
    return "cpu" if "cpu" in names else "gpu"


def identity(order: LoadOrder, kwargs: Mapping[str, Any], device: str) -> dict[str, Any]:
    """All that decides which bytes a copy holds, as JSON data. Reads headers, no weights.

    ``device`` counts because a GPU's kernels round unlike the CPU's.
    """
    recipe = {
        name: value
        for name, value in kwargs["quantization_config"].to_dict().items()
        if name not in _NOT_IN_THE_WEIGHTS and not name.startswith("_")
    }
    return {
        "layout": copies.LAYOUT,
        "source": str(Path(order.path).resolve()),
        "files": identity_of(Path(order.path), order.file_format),
        "recipe": {**recipe, "dtype": str(kwargs["dtype"]), "device": device, "task": order.task},
        "versions": {
            "transformers": transformers.__version__,
            "bitsandbytes": version("bitsandbytes"),
            "torch": str(torch.__version__),
        },
    }


def remove_stale(order: LoadOrder, place: Place) -> None:
    """Remove copies that no load can take any more: of this model's former files, or made by other versions."""
    for other in copies.copies(place.cache_dir):
        source = str(other.identity.get("source", ""))
        moved = other.model == order.name and not Path(source).exists()
        same_source = source == place.identity["source"]
        outdated = any(other.identity.get(part) != place.identity[part] for part in ("layout", "files", "versions"))
        if other.model and (moved or (same_source and outdated)):
            _discard(other.path, f"the files of {other.model}, or the packages, are not those that it was made with")


def whole(place: Place, progress: Report) -> copies.QuantizedCopy | None:
    """The copy, every byte of it checked. One that is damaged is removed: None, as if it had never been there."""
    if not place.folder.is_dir():
        return None
    stage = Progress("checking the quantized copy", unit="MB")
    progress(stage)
    try:
        found = copies.read(place.folder)
        copies.check(found, lambda done, total: progress(replace(stage, done=done // _MB, total=-(-total // _MB))))
    except (BrokenCheckpoint, OSError) as error:
        _discard(place.folder, error)
        return None
    return found


def _discard(folder: Path, why: object) -> None:
    logger.warning("The quantized copy %s is removed: %s", folder.name, why)
    try:
        copies.remove(folder)
    except OSError as error:
        logger.warning("The quantized copy %s cannot be removed: %s", folder.name, error)


# --- reading and writing one ---


def copy_kwargs(kwargs: Mapping[str, Any], folder: Path) -> Kwargs:
    """The kwargs of from_pretrained that read the copy in ``folder`` instead of quantizing the model's own files."""
    config = copy.deepcopy(kwargs["config"])
    config.quantization_config = kwargs["quantization_config"].to_dict()  # so that the weights count as quantized
    config.transformers_weights = None  # names a file of the model's own folder
    others = {name: value for name, value in kwargs.items() if name != "quantization_config"}
    return {**others, "pretrained_model_name_or_path": str(folder), "config": config, "use_safetensors": True}


def keep(
    model: Any, order: LoadOrder, place: Place, progress: Report, free_bytes: int | None = None
) -> tuple[str, ...]:
    """Write the copy of a model that was just quantized, checked, and not used yet. Returns notes; never raises.

    ``free_bytes``: of the disk with the cache folder; measured where None.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return ()  # accelerate has put a part of it elsewhere
    size = sum(report.device_bytes(model).values())
    try:
        root = place.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free if free_bytes is None else free_bytes
        if free < (needed := 2 * size + _SPARE_BYTES):
            return (f"No quantized copy is kept: that takes {format_bytes(needed)} of free disk space, and "
                    f"{format_bytes(free)} are free.",)  # fmt: skip
        with counting("Writing model shards", "keeping the quantized copy", "files", progress):
            _write(model, order, place)
    except Exception as error:  # the model is loaded and sound: it must not be lost to a full disk
        logger.warning("The quantized copy of %s is not kept", order.name, exc_info=True)
        return (f"No quantized copy could be kept: {' '.join(str(error).split())[:200]}.",)
    return (f"A quantized copy is kept ({format_bytes(size)}): the next load like this one reads it.",)


def _write(model: Any, order: LoadOrder, place: Place) -> None:
    """Write aside, seal, rename. A process that ends anywhere in between leaves nothing of the copy's name."""
    aside = copies.partial(place.folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _settings_untouched(model):
            # Names as the model has them: from_pretrained takes them too, and turning them back may not be defined.
            model.save_pretrained(str(aside), max_shard_size=_SHARD, save_original_format=False)
        for name in SETTINGS_FILES:
            (aside / name).unlink(missing_ok=True)
            if (Path(order.path) / name).is_file():
                shutil.copyfile(Path(order.path) / name, aside / name)
        copies.write_manifest(aside, order.name, place.identity)
        if not place.folder.exists():  # another process may have been faster
            aside.rename(place.folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _settings_untouched(model: Any) -> Iterator[None]:
    """save_pretrained changes the configuration, and refuses generation settings that some models come with."""
    config, generation_config = model.config, model.generation_config
    dtype, architectures = config.dtype, config.architectures
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        config.dtype, config.architectures = dtype, architectures
