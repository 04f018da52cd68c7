"""What training a LoRA takes, before anything is loaded: how much memory, for how many parameters, for how long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from modules.devices import Machine
from modules.library import ModelFacts
from modules.library import config as reading
from modules.options import LoadOptions, TrainingOptions
from modules.planner.checkpoint import Checkpoint, from_facts
from modules.planner.devices import CPU, DISK, DevicePlan, Room, gpu_caps
from modules.planner.layout import Block
from modules.planner.lora_fit import Module, modules_of
from modules.planner.memory import DEFAULT
from modules.planner.names import head_module
from modules.planner.placement import Placement
from modules.planner.solving import Answer, Question, solve
from modules.precision import DTYPE_BYTES

# Per trained parameter, all float32: the weight, its gradient, AdamW's two moments.
_TRAINED_BYTES = 16
# Measured with SmolLM2-135M on a CPU, peaks of whole trainings: bfloat16 with 64, 512 and 1,024 tokens a batch, and
# with gradient checkpointing; 4-bit and float32 with 512.
_HIDDEN_KEPT, _INNER_KEPT = 3.0, 2.0  # tensors of tokens × hidden and × intermediate size that a layer keeps
_LOGIT_BYTES = 24  # per token and entry of the vocabulary: logits, float32 copies, their gradients
_LIBRARIES_BYTES = 215 * 2**20  # peft, the Trainer and accelerate, over a process that answers
_UNUSED_SHARE = 0.8  # of what bitsandbytes takes while it quantizes, which is over when the training begins
_RECOMPUTED = 4 / 3  # the work with gradient checkpointing: the forward pass twice
_USED_FLOPS = 0.35  # of what one large multiplication reaches


@dataclass(frozen=True)
class TrainingPlan:
    """In bytes, by part in words. ``on``: the device that has least room for it: "GPU 0", "RAM".

    ``elsewhere_fits``: whether the other devices have room for what lies there.
    """

    parts: dict[str, int]
    parameters: int
    on: str
    free_bytes: int
    elsewhere_fits: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def left_bytes(self) -> int:
        return self.free_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        return self.elsewhere_fits and self.left_bytes >= 0


def training_plan(
    facts: ModelFacts, options: LoadOptions, training: TrainingOptions, machine: Machine, longest_tokens: int,
    device_map: Mapping[str, str] | None = None,
) -> TrainingPlan:  # fmt: skip
    """The plan on ``machine`` as it is when the training's process starts. Pure.

    ``longest_tokens``: the longest example after cutting, which a batch is padded to; 0: the cut-off.
    ``device_map``: where the model will lie; empty: where it would be placed now.
    """
    checkpoint = from_facts(facts)
    answer = _placed(solve(Question(checkpoint, options, machine, 1, DEFAULT)), machine, options, device_map or {})
    element = DTYPE_BYTES[answer.precision.dtype]
    tokens = min(training.cutoff, longest_tokens or training.cutoff) if not training.packing else training.cutoff
    batch_tokens = training.batch_size * tokens
    targets = target_modules(checkpoint, training.target_modules)
    parameters = trained_parameters(targets, training)
    head, layers = _head_key(answer, checkpoint), max(1, answer.layout.layers)
    vocabulary = reading.number(reading.text_part(checkpoint.config), "vocab_size")
    found = []
    for device in _computing(answer):
        here = answer.layers_on(device.key) if answer.layout.layers else 1
        parts = {
            "the model": device.weights_bytes,
            "the process": _process_bytes(device, facts, options),
            "LoRA and optimizer": parameters * _TRAINED_BYTES * here // layers,
            "activations": batch_tokens * _activation_bytes(checkpoint, targets, training, element, here),
            "logits": batch_tokens * vocabulary * _LOGIT_BYTES * (device.key == head),
        }
        found.append(TrainingPlan(parts, parameters, device.name, device.cap_bytes, True))
    least = min(found, key=lambda one: one.left_bytes)
    return replace(least, elsewhere_fits=_rest_fits(answer) and all(one.fits for one in found if one is not least))


def _placed(answer: Answer, machine: Machine, options: LoadOptions, device_map: Mapping[str, str]) -> Answer:
    """The answer for a model that lies as ``device_map`` says, whatever room there is; as it is without one."""
    if not device_map:
        return answer
    devices = tuple(_place_of(block, device_map) for block in answer.layout.blocks)
    caps = gpu_caps(machine, options)
    used = sorted({int(key) for key in devices if key.isdigit()})
    gpus = tuple(Room(str(gpu), caps.get(gpu, 0), 0, DEFAULT.gpu_fixed_bytes) for gpu in used)
    return replace(answer, rooms=replace(answer.rooms, gpus=gpus), placement=Placement(devices))


def _place_of(block: Block, device_map: Mapping[str, str]) -> str:
    """By its own entry, or that of the nearest module around it."""
    for module in block.modules:
        while module and module not in device_map:
            module = module.rpartition(".")[0]
        if module in device_map:
            return device_map[module]
    return next(iter(device_map.values()))


def _computing(answer: Answer) -> list[DevicePlan]:
    """The devices that hold a part of the model and compute it."""
    gpus = [device for device in answer.devices if device.key.isdigit() and device.weights_bytes]
    return gpus or [device for device in answer.devices if device.key == CPU]


def _rest_fits(answer: Answer) -> bool:
    """Whether the model can be placed, all of it on the GPUs where there are some, and RAM has room for the process."""
    if not answer.rooms.gpus:
        return answer.fits
    ram, beside = answer.rooms.ram, {CPU, DISK} & set(answer.placement.devices)
    return answer.fits and not beside and ram.fixed_bytes <= (ram.cap_bytes or 0)


def _head_key(answer: Answer, checkpoint: Checkpoint) -> str:
    """The device that computes the logits."""
    head = head_module(checkpoint)
    pairs = list(zip(answer.layout.blocks, answer.placement.devices, strict=True))
    return next((key for block, key in pairs if block.head or head in block.modules), pairs[-1][1])


def _process_bytes(device: DevicePlan, facts: ModelFacts, options: LoadOptions) -> int:
    """What is there beside tensors."""
    if device.key.isdigit():
        return device.fixed_bytes
    bitsandbytes = options.load_in_4bit or options.load_in_8bit or facts.quantization == "bitsandbytes"
    unused = int(_UNUSED_SHARE * DEFAULT.bitsandbytes_ram_bytes) if bitsandbytes else 0
    return device.fixed_bytes - unused + _LIBRARIES_BYTES


def target_modules(checkpoint: Checkpoint, named: tuple[str, ...]) -> dict[str, Module]:
    """The modules that get a LoRA: those whose name ends with a named one, else all linear ones but the output."""
    modules = {name: module for name, module in modules_of(checkpoint).items() if not module.embedding}
    if named:
        return {n: m for n, m in modules.items() if any(n == t or n.endswith(f".{t}") for t in named)}
    head = head_module(checkpoint)
    return {name: module for name, module in modules.items() if name != head}


def trained_parameters(targets: Mapping[str, Module], training: TrainingOptions) -> int:
    """In number: rank × (inputs + outputs) a module, and with DoRA a size for each output."""
    sizes = training.rank * sum(m.inputs + m.outputs for m in targets.values())
    return sizes + (sum(m.outputs for m in targets.values()) if training.dora else 0)


def _activation_bytes(
    checkpoint: Checkpoint, targets: Mapping[str, Module], training: TrainingOptions, element: int, here: int
) -> int:
    """What ``here`` of the layers keep for the backward pass, in bytes a token. peft keeps a float32 copy of its
    modules' inputs."""
    text = reading.text_part(checkpoint.config)
    layers = max(1, reading.number(text, "num_hidden_layers", "n_layer", "num_layers"))
    hidden = reading.number(text, "hidden_size", "n_embd", "d_model")
    inner = reading.number(text, "intermediate_size", "n_inner", "d_ff", "ffn_dim") or 4 * hidden
    adapted = sum(4 * m.inputs for m in targets.values())
    plain = element * (_HIDDEN_KEPT * hidden + _INNER_KEPT * inner) * layers
    whole = adapted + plain
    if training.gradient_checkpointing:  # each layer's input, and one layer as a whole
        return int(element * hidden * here + whole / layers)
    return int(whole * here / layers)


def training_seconds(
    facts: ModelFacts, training: TrainingOptions, tokens: int, flops: float, tokens_per_second: float = 0.0
) -> float | None:
    """For ``tokens`` that pass through the model, by an earlier training's speed, else by how fast the device
    multiplies; None where neither is known.

    The forward pass takes 2 operations a parameter and token, and so does the backward pass: the frozen weights need
    no gradients of their own.
    """
    if tokens_per_second:
        return tokens / tokens_per_second
    if not flops or not facts.parameters:
        return None
    work = tokens * facts.parameters * 4
    return work * (_RECOMPUTED if training.gradient_checkpointing else 1) / (flops * _USED_FLOPS)


def missing_targets(checkpoint: Checkpoint, named: tuple[str, ...]) -> tuple[str, ...]:
    """Those that no module of the model ends with; ``()`` where the headers do not tell."""
    modules = modules_of(checkpoint)
    known = {re.split(r"\.", name)[-1] for name in modules} | set(modules)
    if not modules:
        return ()
    return tuple(t for t in named if t not in known and not any(name.endswith(f".{t}") for name in modules))
