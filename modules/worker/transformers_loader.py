"""A LoadOrder becomes the kwargs of ``from_pretrained``, in one pure function; the call; and the checks after it."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from modules import precision
from modules.checkpoint import (
    LORA_CONFIG,
    check_files,
    code_hashes,
    code_references,
    refuse_hidden_code,
    safetensors_header,
    weight_files,
)
from modules.devices import cpu_bf16
from modules.errors import (
    BrokenCheckpoint,
    CustomCodeRefused,
    DiskFull,
    LoadstoneError,
    NotAModel,
    OptionError,
)
from modules.options import allowed_gpus
from modules.protocol import LoadOrder, LoadReport, Progress
from modules.worker import quantization, quantized_copies, report, rope, tokenizer
from modules.worker.counting import counting, counting_unpacked
from modules.worker.failures import translate
from modules.worker.placement import DeviceFacts, Sizes, placement, spills
from modules.worker.verification import verify

logger = logging.getLogger(__name__)

_AUTO_CLASSES: Mapping[str, Any] = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
_UNPACKING = "unpacking the weights"  # of a GGUF file, before they are loaded or quantized
_HEADER_DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class LoadedModel:
    """A model that is in memory, checked, and in evaluation mode."""

    model: Any
    tokenizer: Any
    report: LoadReport
    order: LoadOrder


@dataclass(frozen=True)
class ModelFacts:
    """What the files say of the model. ``elements``: weights in number, 0 where not known without reading them."""

    config: Any
    stored_dtype: str  # "float32", "float16", "bfloat16"; "" = not known
    elements: int = 0
    kv_bytes_per_token: int = 0  # at two bytes a number


@dataclass(frozen=True)
class LoadArguments:
    """The kwargs of ``from_pretrained``, and what the user should know of how they were chosen."""

    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()

    def as_text(self) -> dict[str, str]:
        """The kwargs for people: a configuration by its class and RoPE, everything else as Python prints it."""
        return {name: _text(value) for name, value in self.kwargs.items()}


def _text(value: Any) -> str:
    if hasattr(value, "model_type"):
        parameters = getattr(value.get_text_config(), "rope_parameters", None)
        return f"{type(value).__name__}(rope_parameters={parameters})"
    return " ".join(str(value).split())


def load(order: LoadOrder, progress: Callable[[Progress], None]) -> LoadedModel:
    """Load one model as ordered, reporting stages. Raises LoadstoneError only."""
    try:
        return _load(order, progress)
    except LoadstoneError:
        raise
    except Exception as exc:
        raise translate(exc, order) from exc


def _load(order: LoadOrder, progress: Callable[[Progress], None]) -> LoadedModel:
    started = time.perf_counter()
    progress(Progress("reading the configuration"))
    check_source(order)
    facts = model_facts(order)
    stored = quantization.stored_config(facts.config)
    quantization.check_available(order, stored)
    if order.options.attn_implementation != "auto":
        quantization.require(order.options.attn_implementation, f"{order.name} was asked to use")
    if order.options.disk:
        order = replace(order, offload_dir=own_folder(Path(order.offload_dir)))
        check_disk(order)
    device = device_facts(order)
    arguments = load_kwargs(order, device, facts)
    loaded_tokenizer = tokenizer.load(order, facts.config, progress)

    def make(kwargs: dict[str, Any], stage: str = "") -> tuple[Any, tuple[str, ...]]:
        model = load_weights(order, LoadArguments(kwargs), stage or _usual_stage(order), progress)
        progress(Progress("checking what was loaded"))
        return model, verify(model, order, device.usable(order.options), kwargs)

    read = quantized_copies.load(order, arguments.kwargs, make, progress)
    settle_generation(read.model, loaded_tokenizer.tokenizer)
    made = report.make_report(
        read.model,
        loaded_tokenizer.tokenizer,
        order,
        context_limit=report.context_limit(facts.config, order.options),
        kwargs=LoadArguments(read.kwargs).as_text(),
        load_seconds=time.perf_counter() - started,
        notes=(*order.notes, *arguments.notes, *loaded_tokenizer.notes, *read.notes),
        from_copy=read.from_copy,
    )
    return LoadedModel(read.model, loaded_tokenizer.tokenizer, made, order)


def check_source(order: LoadOrder) -> None:
    """Check the files before anything opens them. Raises an error of the tree."""
    path = Path(order.path)
    check_files(path, order.file_format)
    folder = path.parent if order.file_format == "gguf" else path
    if (folder / LORA_CONFIG).exists():
        # from_pretrained would attach it, and load whatever base model the file names.
        raise NotAModel(f"{order.name} is a LoRA ({LORA_CONFIG}).", "Put it under loras/ and load its base model.")
    if not order.custom_code_allowed or order.file_format == "gguf":
        return
    hashes = code_hashes(folder)
    if order.code_hashes and hashes != order.code_hashes:
        raise CustomCodeRefused(
            f"The Python files of {order.name} are not the ones that were allowed: they changed meanwhile.",
            "Look at them again, and allow them if you trust them.",
        )
    references = code_references(folder)
    for name, named in references.items():
        if foreign := [reference for reference in named if "--" in reference]:
            raise CustomCodeRefused(
                f"{name} of {order.name} names Python code of another repository: {', '.join(foreign)}.",
                "Only code that lies in the model's own folder is run. Put the files there and mend auto_map.",
            )
    refuse_hidden_code(folder, references, hashes)


def model_facts(order: LoadOrder) -> ModelFacts:
    """The configuration, and what the headers say. Reads no weights."""
    config = AutoConfig.from_pretrained(**source(order), **_trust(order))
    dtype = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    elements = 0
    if order.file_format == "safetensors":
        elements, header_dtype = _count_elements(Path(order.path))
        dtype = header_dtype or dtype
    return ModelFacts(config, dtype, elements, kv_bytes_per_token=2 * rope.kv_numbers(config.get_text_config()))


def _count_elements(path: Path) -> tuple[int, str]:
    """How many numbers the safetensors files hold, and the dtype of most of them ("" where it is not a float)."""
    counts: dict[str, int] = {}
    for file in weight_files(path, "safetensors"):
        for name, entry in safetensors_header(file).items():
            if name != "__metadata__":
                size = 1
                for length in entry["shape"]:
                    size *= length
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + size
    floats = {name: count for name, count in counts.items() if name in _HEADER_DTYPES}
    most = max(floats, key=lambda name: floats[name], default="")
    return sum(counts.values()), _HEADER_DTYPES.get(most, "")


def source(order: LoadOrder) -> dict[str, Any]:
    """Where ``from_pretrained`` reads from: never anywhere but the model's own files."""
    path = Path(order.path)
    if order.file_format == "gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}


def _trust(order: LoadOrder) -> dict[str, bool]:
    return {"trust_remote_code": order.custom_code_allowed}  # None would ask on the terminal


def load_kwargs(order: LoadOrder, device: DeviceFacts, facts: ModelFacts) -> LoadArguments:
    """The kwargs of ``from_pretrained`` for this order on this machine. Pure: the same facts give the same kwargs.

    Raises OptionConflict and OutOfMemory where the order cannot be followed.
    """
    options = order.options
    device = device.usable(options)
    stored = quantization.stored_config(facts.config)
    dtype, notes = weights_dtype(order, device, facts.stored_dtype)
    quantizes = quantization.on_the_fly(options)
    in_memory = facts.elements * dtype.itemsize if not quantizes and not stored else 0
    sizes = Sizes(weight_bytes=in_memory, kv_bytes=facts.kv_bytes_per_token * order.ctx_tokens)
    kwargs: dict[str, Any] = {
        **source(order),
        **_trust(order),
        "config": rope.stretched_config(facts.config, options),
        "dtype": dtype,
        **placement(order, device, sizes, quantizes),
    }
    if order.file_format != "gguf":
        kwargs["use_safetensors"] = order.file_format == "safetensors"
        kwargs["weights_only"] = True
    if options.attn_implementation != "auto":
        kwargs["attn_implementation"] = options.attn_implementation
    config = quantization.quantization_config(order, stored, device, spills(order, device))
    if config is not None:
        kwargs["quantization_config"] = config
    if quantizes and device.gpus == 0 and options.cpu_memory and not order.device_map:  # a plan has kept to it
        notes = (*notes, "Loaded without a plan, layers that are quantized on a CPU take what RAM they need: "
                 "cpu-memory has no effect.")  # fmt: skip
    return LoadArguments(kwargs, notes)


def weights_dtype(order: LoadOrder, device: DeviceFacts, stored: str) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype of what is not quantized, with notes on a choice the options do not show.

    ``stored`` is the checkpoint's dtype by name, ``device`` what the options let the model touch.
    """
    name, notes = precision.weights_dtype(
        order.options,
        stored=stored,
        prequantized=bool(order.quantization) and order.file_format != "gguf",
        gpus=device.gpus,
        gpu_bf16=device.bf16,
        cpu_bf16=device.cpu_bf16,
        unpacked=order.quantization in precision.UNPACKED,
    )
    return quantization.DTYPES[name], notes


def device_facts(order: LoadOrder) -> DeviceFacts:
    """What torch sees now of the devices that the order lets the model touch.

    A GPU's free memory is 0 where the order says what the GPUs hold: asking makes a CUDA context, which takes hundreds
    of megabytes of each GPU asked, the ones left out too, and cannot be made on one that is full.
    """
    ram = int(psutil.virtual_memory().available)
    places = order.device_map.values()
    on_cpu = order.options.cpu or (bool(places) and not any(place.isdigit() for place in places))
    if on_cpu or not torch.cuda.is_available():
        return DeviceFacts(cpu_bf16=cpu_bf16(), ram_free_bytes=ram)
    gpus = range(torch.cuda.device_count())
    told = order.device_map or order.options.gpu_memory
    free = tuple(0 if told else int(torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus)
    capability = min(
        (torch.cuda.get_device_capability(gpu) for gpu in allowed_gpus(order.options, len(gpus))), default=(0, 0)
    )
    return DeviceFacts(free, precision.computes_bf16(capability), cpu_bf16(), ram)


def _usual_stage(order: LoadOrder) -> str:
    return "quantizing the weights" if quantization.on_the_fly(order.options) else "loading the weights"


def load_weights(order: LoadOrder, arguments: LoadArguments, stage: str, progress: Callable[[Progress], None]) -> Any:
    """Call ``from_pretrained``; the model in evaluation mode. Raises BrokenCheckpoint where tensors are missing."""
    for name, value in arguments.as_text().items():
        logger.info("%s: from_pretrained(%s=%s)", order.name, name, value)
    progress(Progress(_UNPACKING if order.file_format == "gguf" else stage))
    auto_class = _AUTO_CLASSES[order.task]
    with counting_unpacked(_UNPACKING, progress), counting("Loading weights", stage, "tensors", progress):
        model, info = auto_class.from_pretrained(**arguments.kwargs, output_loading_info=True)
    parameters = {name for name, _ in model.named_parameters()}
    if missing := sorted(parameters & set(info["missing_keys"])):
        raise BrokenCheckpoint(
            f"The files of {order.name} lack {len(missing)} of {len(parameters)} tensors that its architecture needs: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}.",
            "The model may be another kind than a language model, or an incomplete download.",
        )
    return model.eval()


def own_folder(parent: Path) -> str:
    """A new folder under ``parent`` for this load's offloaded layers, removed when the process ends.

    Folders of processes that were killed are removed too: each is named after its process. Raises OptionError
    where nothing can be written there.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f"load-{os.getpid()}-", dir=parent)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise OptionError(
            f"The folder for offloaded layers, {parent}, cannot be written: {error.strerror}.",
            "Name another folder with --disk-cache-dir.",
        ) from None
    for folder in parent.glob("load-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def check_disk(order: LoadOrder) -> None:
    """Raise DiskFull where offloaded layers may not fit. Those of safetensors files stay where they are."""
    if order.file_format != "pytorch":
        return
    needed = sum(file.stat().st_size for file in weight_files(Path(order.path), "pytorch"))
    free = shutil.disk_usage(order.offload_dir).free
    if free < needed:
        raise DiskFull(
            f"Offloading {order.name} may take {needed:,} bytes in {order.offload_dir}; {free:,} are free.",
            "Free some space, or name another folder with --disk-cache-dir.",
        )


def settle_generation(model: Any, loaded_tokenizer: Any) -> None:
    """Give model and tokenizer a padding token, so that no call has to warn about a missing one."""
    config = model.generation_config
    if loaded_tokenizer.pad_token_id is None and loaded_tokenizer.eos_token is not None:
        loaded_tokenizer.pad_token = loaded_tokenizer.eos_token
    if config.eos_token_id is None:
        config.eos_token_id = loaded_tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = loaded_tokenizer.pad_token_id
