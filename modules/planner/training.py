"""What training a LoRA takes, before anything is loaded: how much memory, for how many parameters, for how long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from modules.devices import Machine
from modules.library import ModelFacts
from modules.library import config as reading
from modules.options import LoadOptions, TrainingOptions
from modules.planner.checkpoint import Checkpoint, from_facts
from modules.planner.devices import DevicePlan
from modules.planner.lora_fit import Module, modules_of
from modules.planner.memory import DEFAULT
from modules.planner.names import head_module
from modules.planner.planning import plan
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
    """In bytes, by part in words. ``on``: the device that has least room for it: "GPU 0", "RAM"."""

    parts: dict[str, int]
    parameters: int
    on: str
    free_bytes: int
    model_fits: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.model_fits and self.total_bytes <= self.free_bytes


def training_plan(
    facts: ModelFacts, options: LoadOptions, training: TrainingOptions, machine: Machine, longest_tokens: int
) -> TrainingPlan:
    """The plan on ``machine`` as it is when the training's process starts. Pure.

    ``longest_tokens``: the longest example after cutting, which a batch is padded to; 0: the cut-off.
    """
    checkpoint = from_facts(facts)
    held = plan(facts, options, machine, ctx_tokens=1)
    device = next((one for one in held.devices if one.key.isdigit()), held.devices[0])
    element = DTYPE_BYTES[held.precision.dtype]
    tokens = min(training.cutoff, longest_tokens or training.cutoff) if not training.packing else training.cutoff
    batch_tokens = training.batch_size * tokens
    targets = target_modules(checkpoint, training.target_modules)
    parameters = trained_parameters(targets, training)
    return TrainingPlan(
        parts={
            "the model": sum(one.weights_bytes for one in held.devices if one.key == device.key),
            "the process": _process_bytes(device, facts, options),
            "LoRA and optimizer": parameters * _TRAINED_BYTES,
            "activations": batch_tokens * _activation_bytes(checkpoint, targets, training, element),
            "logits": batch_tokens * reading.number(reading.text_part(checkpoint.config), "vocab_size") * _LOGIT_BYTES,
        },
        parameters=parameters,
        on=device.name,
        free_bytes=device.cap_bytes,
        model_fits=held.fits,
    )


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
    checkpoint: Checkpoint, targets: Mapping[str, Module], training: TrainingOptions, element: int
) -> int:
    """What is kept for the backward pass, in bytes a token. peft keeps a float32 copy of its modules' inputs."""
    text = reading.text_part(checkpoint.config)
    layers = max(1, reading.number(text, "num_hidden_layers", "n_layer", "num_layers"))
    hidden = reading.number(text, "hidden_size", "n_embd", "d_model")
    inner = reading.number(text, "intermediate_size", "n_inner", "d_ff", "ffn_dim") or 4 * hidden
    adapted = sum(4 * m.inputs for m in targets.values())
    plain = element * (_HIDDEN_KEPT * hidden + _INNER_KEPT * inner) * layers
    whole = adapted + plain
    if training.gradient_checkpointing:  # each layer's input, and one layer as a whole
        return int(element * hidden * layers + whole / layers)
    return int(whole)


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
