"""The plan of one load: whether it fits, what each device will hold, which layer goes where, and what else would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modules.devices import Machine
from modules.library import ModelFacts
from modules.options import LoadOptions
from modules.planner.adapters import Adapters
from modules.planner.checkpoint import Checkpoint, from_facts
from modules.planner.devices import CPU, DISK, DevicePlan
from modules.planner.formats import Precision
from modules.planner.memory import DEFAULT, Calibration, arriving_bytes
from modules.planner.offload import Offload, offload_of
from modules.planner.solving import Answer, Question, solve
from modules.planner.suggestions import Suggestion, on_gpus_alone, spare_context, suggestions
from modules.units import format_bytes


@dataclass(frozen=True)
class Plan:
    """All in bytes. ``weights_bytes`` is what the loaded model's parameters and buffers take together;
    ``peak_bytes`` what all devices but the disk hold at the worst moment; ``missing_bytes`` 0 where it fits.

    ``device_map``: module → "cpu", "disk" or the GPU's number. ``ctx_tokens``: the context that it is for;
    ``spare_context_tokens``: how much longer one would fit, on the GPUs alone where it lies so. ``offloaded``: of a
    model that fits, what lies in RAM or on disk beside the GPUs, and what that costs; "" = nothing. ``exact``: whether
    the weights are counted on headers, by rules that are proven for the architecture. ``packing``: how weights are
    packed that the files hold so: "gptq", "unpacked fp8" where they are unpacked while they are loaded. ``path``: the
    folder or file, "" = not known.
    """

    model: str
    fits: bool
    weights_bytes: int
    peak_bytes: int
    missing_bytes: int
    missing_on: str  # the device's name: "GPU 0", "RAM"
    device_map: dict[str, str]
    devices: tuple[DevicePlan, ...]
    precision: Precision
    suggestions: tuple[Suggestion, ...] = ()
    ctx_tokens: int = 0
    spare_context_tokens: int = 0
    offloaded: str = ""
    exact: bool = True
    notes: tuple[str, ...] = field(default=())
    file_format: str = "safetensors"
    packing: str = ""
    path: str = ""

    @property
    def peak(self) -> str:
        """The most that all devices but the disk hold together, in words."""
        in_use = sum(device.total_bytes for device in self.devices if device.key != DISK)
        when = "while it is loaded" if self.peak_bytes > in_use else "with a full context"
        return f"{format_bytes(self.peak_bytes)} {when}"

    @property
    def away_bytes(self) -> int:
        """Weights that are brought from RAM or disk to where they are computed, for every token."""
        computing = {device.key for device in self.devices if device.key.isdigit()} or {CPU}
        return sum(device.weights_bytes for device in self.devices if device.key not in computing)

    def to_dict(self) -> dict[str, Any]:
        """The plan as ``--plan --json`` prints it."""
        return {
            "model": self.model,
            "fits": self.fits,
            "weights_bytes": self.weights_bytes,
            "peak_bytes": self.peak_bytes,
            "missing_bytes": self.missing_bytes,
            "device_map": dict(self.device_map),
            "devices": [{key: getattr(device, key) for key in _DEVICE_KEYS} for device in self.devices],
            "suggestions": [{"text": item.text, "options": dict(item.options)} for item in self.suggestions],
        }


_DEVICE_KEYS = (
    "name", "cap_bytes", "weights_bytes", "kv_cache_bytes", "working_bytes", "fixed_bytes", "total_bytes",
)  # fmt: skip


def plan(
    facts: ModelFacts | Checkpoint,
    options: LoadOptions,
    machine: Machine,
    *,
    ctx_tokens: int,
    calibration: Calibration = DEFAULT,
    adapters: Adapters = (),
) -> Plan:
    """Plan a load. Pure: the same facts give the same plan.

    ``adapters``: LoRAs that are applied, as (module, bytes).
    Raises nothing where the model does not fit: the plan says by how much.
    """
    checkpoint = facts if isinstance(facts, Checkpoint) else from_facts(facts)
    question = Question(checkpoint, options, machine, ctx_tokens, calibration, adapters)
    answer = solve(question)
    elsewhere = answer.offloads or DISK in answer.placement.devices
    away = offload_of(answer, calibration) if answer.fits and elsewhere else None
    return Plan(
        model=checkpoint.name,
        fits=answer.fits,
        weights_bytes=sum(device.weights_bytes for device in answer.devices),
        peak_bytes=_peak(question, answer),
        missing_bytes=answer.placement.missing_bytes,
        missing_on=next((d.name for d in answer.devices if d.key == answer.placement.missing_on), ""),
        device_map=answer.device_map,
        devices=answer.devices,
        precision=answer.precision,
        suggestions=_suggestions(question, answer),
        ctx_tokens=ctx_tokens,
        spare_context_tokens=spare_context(question, answer) if answer.fits else 0,
        offloaded=f"{away.kept}: each token takes {away.longer} longer, or more" if away else "",
        exact=answer.layout.exact,
        notes=tuple(_notes(question, answer, away)),
        file_format=checkpoint.file_format,
        packing=f"unpacked {checkpoint.quantization}" if question.held.unpacked else checkpoint.quantization,
        path="" if isinstance(facts, Checkpoint) else str(facts.model.path),
    )


def _suggestions(question: Question, answer: Answer) -> tuple[Suggestion, ...]:
    """What would make it fit; of what fits with a part beside the GPUs, what would spare it that."""
    if not answer.fits:
        return suggestions(question)
    return on_gpus_alone(question) if answer.offloads else ()


def _peak(question: Question, answer: Answer) -> int:
    """What all devices but the disk hold at most: at a full context, or while weights are converted in RAM."""
    in_use = sum(device.total_bytes for device in answer.devices if device.key != DISK)
    checkpoint, precision = question.held, answer.precision
    converted = bool(precision.quantization) or precision.dtype != checkpoint.stored_dtype
    packed = checkpoint.quantization and not checkpoint.unpacked
    if answer.rooms.gpus or packed or not (converted or checkpoint.unpacked):
        return in_use
    (ram,) = (device for device in answer.devices if device.key == CPU)
    mapped = int(checkpoint.size_bytes * question.calibration.mapped_share)
    arriving = arriving_bytes(answer.layout, precision, question.calibration)
    return max(in_use, ram.weights_bytes + ram.fixed_bytes + mapped + arriving)


def _notes(question: Question, answer: Answer, away: Offload | None) -> list[str]:
    """What is not obvious of how the weights will lie. ``away``: what lies beside the GPUs where the model fits so."""
    notes = []
    if not answer.layout.exact:
        close = "from the headers; this architecture may differ by a little" if question.checkpoint.tensors else (
            "from the files' size and the configuration")  # fmt: skip
        notes.append(f"The weights are estimated {close}.")
    if question.held.unpacked:
        notes.append(
            f"The weights are stored as {question.checkpoint.quantization.upper()} and unpacked to "
            f"{answer.precision.dtype}: nothing here multiplies them packed."
        )
    if away:
        where, brought = ("on a GPU", "brought to it") if answer.rooms.gpus else ("in RAM", "read")
        notes.append(
            f"Not all of the weights lie {where}: {away.kept}. They are {brought} for every token, which takes "
            f"{away.longer} longer, or more."
        )
    if not question.quantizes:
        return notes
    fused = sum(device.classes.kept for device in answer.devices if device.key != DISK)
    experts = [p for b in answer.layout.blocks for p in b.parts if p.fused]
    if experts:
        notes.append(
            f"A mixture's experts stay in 16 bit: bitsandbytes converts linear layers alone. "
            f"{format_bytes(fused)} of the weights are not quantized."
        )
    if answer.offloads:
        notes.append("Layers in RAM or on disk stay in 16 bit: bitsandbytes converts those on a GPU.")
    return notes
