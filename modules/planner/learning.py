"""What earlier loads on this machine teach the plan: how much more or less a load of a kind takes than was planned.

A plan's weights and KV cache are counted, its fixed costs and working memory are estimates. So what differs from the
plan is put down to these. Between two sizes that were measured the difference is interpolated, beyond them it stays
what it was at the nearest: a small model says little about the slope of a large one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from modules.planner.devices import CPU, DISK, DevicePlan
from modules.planner.memory import DEFAULT, Calibration
from modules.planner.planning import Plan
from modules.protocol import Expected

_FROM_COPY = " from a copy"
_ALIKE = 1.05  # plans that differ by less than this factor are of one size


@dataclass(frozen=True)
class Measurement:
    """One load: what was planned without any correction, with it, and what it took. In bytes."""

    model: str
    kind: str
    machine: str
    planned_bytes: int
    corrected_bytes: int
    measured_bytes: int
    used_tokens: int
    time: float  # seconds since 1970

    @property
    def error(self) -> float:
        """How far the plan was from what was measured: 0.03 = 3 % too much."""
        return self.corrected_bytes / self.measured_bytes - 1


def kind_of(plan: Plan, device: str, *, from_copy: bool) -> str:
    """The kind of load, on ``device``: "GPU" or "RAM". Each way to read weights takes memory of its own."""
    held = {place if place in (CPU, DISK) else "GPU" for place in plan.device_map.values()}
    names = {"GPU": "GPU", CPU: "RAM", DISK: "disk"}
    places = " + ".join(name for key, name in names.items() if key in held)
    precision = plan.precision
    double = ", double quantization" if precision.double_quant else ""
    packed = f"{precision.quantization}{double} ({precision.dtype})" if precision.quantization else precision.dtype
    return f"{packed}{_source(plan)}{_FROM_COPY if from_copy else ''} on {places}: {device}"


def _source(plan: Plan) -> str:
    """What the weights are read of, where that is not plain ones in safetensors: `` of gguf``, `` of unpacked fp8``."""
    files = {"safetensors": "", "pytorch": ".bin"}.get(plan.file_format, plan.file_format)
    packing = plan.packing if plan.packing != files else ""  # a .gguf file's is "gguf" too
    read = " ".join(part for part in (packing, files) if part)
    return f" of {read}" if read else ""


def filed(kind: str, *, from_copy: bool) -> str:
    """The kind of the same load, where a quantized copy was read, or was not, whatever was expected."""
    plain = kind.replace(f"{_FROM_COPY} on ", " on ")
    return plain.replace(" on ", f"{_FROM_COPY} on ", 1) if from_copy else plain


def device_of(kind: str) -> str:
    """ "GPU" or "RAM", of a kind that :func:`kind_of` made."""
    return kind.rsplit(" ", 1)[1]


def expected(plan: Plan, calibration: Calibration, *, from_copy: bool) -> tuple[Expected, ...]:
    """What ``plan``, made with ``calibration``, says of the GPUs and of RAM; of GPUs only where there are some."""
    gpus = _gpus_in_use(plan)
    ram = [device for device in plan.devices if device.key == CPU]
    found = []
    for name, devices, correction in (
        ("GPU", gpus, calibration.gpu_correction_bytes * len(gpus)), ("RAM", ram, calibration.ram_correction_bytes),
    ):  # fmt: skip
        if devices:
            steady = sum(device.weights_bytes + device.fixed_bytes for device in devices)
            context = sum(device.kv_cache_bytes + device.working_bytes for device in devices)
            loading = plan.peak_bytes if name == "RAM" and not gpus and plan.peak_bytes > steady + context else 0
            kind = kind_of(plan, name, from_copy=from_copy)
            found.append(Expected(kind, steady, context, loading, correction))
    return tuple(found)


def calibrated(
    plan: Plan, measurements: Iterable[Measurement], *, from_copy: bool, base: Calibration = DEFAULT
) -> Calibration:
    """``base``, which ``plan`` was made with, corrected by what loads of the plan's kind took: by no more than makes
    the fixed costs nothing, which is all that a plan takes off."""
    known = list(measurements)
    corrections = {"GPU": 0, "RAM": 0}
    for one in expected(plan, base, from_copy=from_copy):
        corrections[device_of(one.kind)] = correction([m for m in known if m.kind == one.kind], one.peak_bytes())
    gpus = _gpus_in_use(plan)
    ram = [device for device in plan.devices if device.key == CPU]
    return base.corrected(
        gpu_bytes=max(corrections["GPU"] // max(1, len(gpus)), -_fixed_bytes(gpus)),
        ram_bytes=max(corrections["RAM"], -_fixed_bytes(ram)),
    )


def _fixed_bytes(devices: Iterable[DevicePlan]) -> int:
    """The fixed costs of each of these; the least where they differ."""
    return min((device.fixed_bytes for device in devices), default=0)


def _gpus_in_use(plan: Plan) -> list[DevicePlan]:
    """Those that hold something: only there is a context, and what it takes more than was planned."""
    return [device for device in plan.devices if device.key not in (CPU, DISK) and device.total_bytes]


def correction(measurements: Iterable[Measurement], planned_bytes: int) -> int:
    """How much more than ``planned_bytes`` a load will take, by loads of its kind; negative: how much less."""
    sizes, differences = _by_size(measurements)
    if not sizes:
        return 0
    right = bisect_left(sizes, planned_bytes)
    if right in (0, len(sizes)):
        return differences[min(right, len(sizes) - 1)]
    left = right - 1
    share = (planned_bytes - sizes[left]) / (sizes[right] - sizes[left])
    return int(differences[left] + share * (differences[right] - differences[left]))


def _by_size(measurements: Iterable[Measurement]) -> tuple[list[int], list[int]]:
    """Sizes as planned, ascending, and the median difference of the loads of about that size."""
    groups: list[list[Measurement]] = []
    for one in sorted(measurements, key=lambda m: m.planned_bytes):
        if groups and one.planned_bytes <= groups[-1][0].planned_bytes * _ALIKE:
            groups[-1].append(one)
        else:
            groups.append([one])
    sizes = [int(median(m.planned_bytes for m in group)) for group in groups]
    return sizes, [int(median(m.measured_bytes - m.planned_bytes for m in group)) for group in groups]
