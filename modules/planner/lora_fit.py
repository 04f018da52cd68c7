"""Whether a LoRA fits a model, by the headers of both: nothing is loaded, and no ML package is imported."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from modules.checkpoint import check_lora_config
from modules.errors import AdapterError, AdapterMismatch
from modules.library import ModelFacts
from modules.library import config as reading
from modules.library.loras import LoraFacts
from modules.library.tensors import TensorInfo
from modules.planner.architectures import CONV1D
from modules.planner.checkpoint import Checkpoint, from_facts
from modules.planner.layout import layout_of
from modules.planner.names import head_module, loaded_tensors

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.((?:lora|hada|lokr)_\w+|token_adapter\.\w+)(\.weight|\.bias)?$")
# The matrices that make up a change: outputs × rank, rank × inputs. LoKr's factors tell of neither.
_PAIRS = (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A"), ("hada_w1_a", "hada_w1_b"),
          ("hada_w2_a", "hada_w2_b"))  # fmt: skip
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save|\.base_layer|\.original_module)?\.(weight|bias)$")
_EXPERTS = re.compile(r"\.experts(\.|$)")  # which transformers fuses: their names in files are not those of modules


@dataclass(frozen=True)
class Module:
    """A module that a LoRA may change. ``outputs`` and ``inputs`` are 0 where the headers do not tell."""

    outputs: int
    inputs: int
    elements: int = 0  # of its weight; 0 = not known
    embedding: bool = False


@dataclass(frozen=True)
class LoraFit:
    """``warnings``: what fits and yet deserves a word. ``checked``: False where only loading can tell."""

    warnings: tuple[str, ...] = ()
    checked: bool = True


def lora_fit(lora: LoraFacts, model: ModelFacts) -> LoraFit:
    """Raises AdapterMismatch where the LoRA does not fit the model, AdapterError where it fits none."""
    check_lora_config(lora.lora.name, lora.config)
    checkpoint = from_facts(model)
    if not model.tensors or model.model.file_format == "gguf" or not layout_of(checkpoint).exact:
        return LoraFit(_base_warning(lora, model, "whether its shapes fit is seen when it is applied"), checked=False)
    modules = modules_of(checkpoint)
    changed = {name: parts for name, parts in _by_module(lora).items() if not _EXPERTS.search(name)}
    for module, parts in changed.items():
        _check_module(lora, model, modules, module, parts)
    warnings = _check_targets(lora, model, changed, modules)
    return LoraFit((*_base_warning(lora, model, "its shapes fit"), *warnings))


def _base_warning(lora: LoraFacts, model: ModelFacts, but: str) -> tuple[str, ...]:
    own = model.model.name.rpartition("/")[2]
    if not lora.base_name or lora.base_name.casefold() == own.casefold():
        return ()
    return (f"{lora.lora.name} was trained on {lora.base_name}, not on {own}; {but}.",)


# --- the model ---

_modules: list[tuple[Checkpoint, dict[str, Module]]] = []
_KEPT = 4


def modules_of(checkpoint: Checkpoint) -> dict[str, Module]:
    """Every module with a weight of two dimensions, by its name in the loaded model; those of the last few are kept."""
    for known, found in list(_modules):
        if known is checkpoint:
            return found
    made = _read_modules(checkpoint)
    _modules.insert(0, (checkpoint, made))
    del _modules[_KEPT:]
    return made


def _read_modules(checkpoint: Checkpoint) -> dict[str, Module]:
    tensors = dict(loaded_tensors(checkpoint))
    config = checkpoint.config
    transposed = str(reading.text_part(config).get("model_type", "")) in CONV1D
    found: dict[str, Module] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(tensor.shape) == 2:
            found[owner] = _plain(name, tensor, tensors, transposed and not _is_embedding(owner))
        elif leaf == "qweight" and (packed := _packed(owner, tensors, checkpoint.quantization)):
            found[owner] = packed
    head = head_module(checkpoint)
    if head not in found and (tied := [m for name, m in found.items() if m.embedding and "position" not in name]):
        found[head] = Module(tied[0].outputs, tied[0].inputs, tied[0].elements)
    return found


def _is_embedding(owner: str) -> bool:
    return bool(re.search(r"(embed_tokens|wte|wpe|shared|word_embeddings|embed_in|embed_positions)$", owner))


def _plain(name: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], transposed: bool) -> Module:
    owner = name.rpartition(".")[0]
    rows, columns = tensor.shape
    if f"{name}.absmax" in tensors:  # bitsandbytes in 4 bits: two numbers a byte, and the shape is not in the header
        return Module(0, 0, 2 * tensor.elements)
    if transposed:
        rows, columns = columns, rows
    return Module(rows, columns, tensor.elements, _is_embedding(owner))


def _packed(owner: str, tensors: Mapping[str, TensorInfo], quantization: str) -> Module | None:
    """A layer of GPTQ (qweight: inputs × bits / 32, outputs) or AWQ (qweight: inputs, outputs × bits / 32)."""
    weight, scales = tensors[f"{owner}.qweight"], tensors.get(f"{owner}.scales")
    if scales is None or len(scales.shape) != 2 or len(weight.shape) != 2:
        return None
    outputs = scales.shape[1]
    if quantization == "awq":
        return Module(outputs, weight.shape[0])
    order = tensors.get(f"{owner}.g_idx")
    return Module(outputs, order.shape[0] if order and order.shape else 0)


# --- the LoRA against it ---


def _by_module(lora: LoraFacts) -> dict[str, dict[str, TensorInfo]]:
    """Module → the LoRA's tensors for it: ``lora_A``, ``lora_B``, …, or ``weight`` and ``bias`` of one kept whole."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in lora.tensors.items():
        plain = name.removeprefix(_PREFIX)
        match = _LORA.match(plain) or _WHOLE.match(plain)
        if match is None:
            raise AdapterError(f"{lora.lora.name} holds a tensor that no LoRA has: {name}.")
        bias = ".bias" if match.re is _LORA and match[3] == ".bias" else ""
        found.setdefault(match[1], {})[match[2] + bias] = tensor
    return found


def _check_targets(
    lora: LoraFacts, model: ModelFacts, changed: Mapping[str, Collection[str]], modules: Collection[str]
) -> tuple[str, ...]:
    """What the configuration lists and the tensors are the same modules: peft leaves out the rest without a word.

    Returns warnings of targets that neither the LoRA nor the model has. A pattern is not run: one that somebody else
    wrote may take for ever.
    """
    kept = lora.modules_to_save
    if lora.targets_by_pattern or not lora.target_modules:
        targets: tuple[str, ...] = ()
    else:
        targets = lora.target_modules
        for name, parts in changed.items():
            if not any(_names(word, name) for word in (*targets, *kept)) and not _whole(parts):
                raise _mismatch(lora, model, f"it holds matrices for {name}, which is none of its target modules")
        _check_complete(lora, model, changed, [name for name in modules if _targeted(targets, name)])
    absent = [word for word in (*targets, *kept) if not any(_names(word, name) for name in modules)]
    if absent and len(absent) == len((*targets, *kept)):
        raise _mismatch(lora, model, f"it changes {', '.join(absent)}, and the model has no module of that name")
    return (
        (f"{lora.lora.name} lists {', '.join(absent)}, of which neither it nor the model has any.",) if absent else ()
    )


def _check_complete(lora: LoraFacts, model: ModelFacts, changed: Collection[str], targeted: Collection[str]) -> None:
    """Each module of the model that the configuration names has matrices. One that picks layers is not looked at."""
    if any(lora.config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules")):
        return
    if missing := [name for name in targeted if name not in changed and not _EXPERTS.search(name)]:
        raise _mismatch(
            lora, model, f"it targets {missing[0]} and holds no matrices for it, nor for {len(missing) - 1:,} others"
        )


def _targeted(words: Collection[str], module: str) -> bool:
    """As peft matches a list of target modules."""
    return any(module == word or module.endswith(f".{word}") for word in words)


def _names(word: str, module: str) -> bool:
    """Whether ``word`` names the module or, for one that is kept whole, a module around it."""
    return f".{word}." in f".{module}."


def _whole(parts: Collection[str]) -> bool:
    return set(parts) <= {"weight", "bias"}


def _check_module(
    lora: LoraFacts, model: ModelFacts, modules: Mapping[str, Module], name: str, parts: Mapping[str, TensorInfo]
) -> None:
    module = modules.get(name)
    if module is None:
        if _whole(parts) and any(len(part.shape) == 1 for part in parts.values()):
            return  # a norm kept whole: it is looked at when it is applied
        raise _mismatch(lora, model, f"it changes {name}, which the model does not have")
    for wrong in _differences(lora, module, name, parts):
        raise _mismatch(lora, model, wrong)


def _differences(lora: LoraFacts, module: Module, name: str, parts: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What of the tensors for one module does not fit it, in words."""
    shapes = {part: tensor.shape for part, tensor in parts.items()}
    if "weight" in shapes:
        yield from _whole_differences(module, name, shapes["weight"])
    for up, down in _PAIRS:
        if up not in shapes and down not in shapes:
            continue
        b, a = shapes.get(up, ()), shapes.get(down, ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            yield f"its matrices for {name} do not belong together: {_by(b)} and {_by(a)}"
            return
        outputs, inputs = (a[1], b[0]) if "embedding" in up else (b[0], a[1])
        yield from _size_differences(module, name, outputs, inputs)
        if not lora.config.get("rank_pattern") and a[0] != lora.config.get("r"):
            yield f"its rank is {lora.config.get('r')}, and its matrices for {name} have {a[0]}"
    magnitude = shapes.get("lora_magnitude_vector")
    if magnitude is not None and module.outputs and magnitude[-1:] != (module.outputs,):
        yield f"its magnitudes for {name} are {_by(magnitude)}, the model's outputs {module.outputs:,}"


def _size_differences(module: Module, name: str, outputs: int, inputs: int) -> Iterator[str]:
    if not module.outputs or not module.inputs:
        if module.elements and module.elements != outputs * inputs:
            yield f"{name} is {outputs:,} × {inputs:,} for it, and has {module.elements:,} numbers in the model"
    elif (outputs, inputs) != (module.outputs, module.inputs):
        yield f"{name} is {outputs:,} × {inputs:,} for it, and {module.outputs:,} × {module.inputs:,} in the model"


def _whole_differences(module: Module, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    if len(shape) != 2:
        return
    own = (module.outputs, module.inputs)
    vocabulary = module.embedding or name.endswith(("lm_head", "embed_out"))
    if vocabulary and shape[1] == own[1] and shape[0] != own[0]:
        yield f"its vocabulary has {shape[0]:,} tokens, the model's {own[0]:,}"
    elif own != shape and own[::-1] != shape:  # Conv1D is stored the other way round
        yield from _size_differences(module, name, *shape)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in shape) or "nothing"


def _mismatch(lora: LoraFacts, model: ModelFacts, why: str) -> AdapterMismatch:
    base = f"Load {lora.base_name}, on which it was trained, or choose another LoRA." if lora.base_name else ""
    return AdapterMismatch(f"{lora.lora.name} does not fit {model.model.name}: {why}.", base)


# --- what it takes ---

_APPLIED_BYTES = 4  # peft holds the matrices of a 16-bit model as float32


def lora_bytes(lora: LoraFacts) -> dict[str, int]:
    """Module → the bytes that the LoRA takes there when it is applied."""
    return {
        module: _APPLIED_BYTES * sum(tensor.elements for tensor in parts.values())
        for module, parts in _by_module(lora).items()
    }
