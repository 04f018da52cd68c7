"""The devices as room for a model: what each may hold at most, and what it holds in a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from modules.devices import Machine
from modules.options import LoadOptions, allowed_gpus
from modules.planner.formats import Classes

GIB = 2**30
CPU, DISK = "cpu", "disk"


@dataclass(frozen=True)
class Room:
    """A device before anything is placed. ``cap_bytes`` bounds everything on it; None = no bound, as of a
    disk that is not written to."""

    key: str  # as a device map names it: "0", "cpu", "disk"
    cap_bytes: int | None
    working_bytes: int = 0  # where it computes
    fixed_bytes: int = 0  # where it computes at all; RAM: always


@dataclass(frozen=True)
class DevicePlan:
    """What one device holds. ``name``: "GPU 0", "RAM", "disk"; ``key``: its name in a device map."""

    name: str
    key: str
    cap_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    fixed_bytes: int
    classes: Classes = field(default_factory=Classes)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.working_bytes + self.fixed_bytes


@dataclass(frozen=True)
class Rooms:
    """Where a model may lie: GPUs in order, then RAM, then the disk. RAM alone computes where there is no GPU."""

    gpus: tuple[Room, ...]
    ram: Room
    spill: bool  # whether layers may lie in RAM beside a GPU
    disk: bool
    disk_bytes: int | None = None  # how much may be written there; None = no bound, as where nothing is written

    @property
    def store(self) -> Room:
        """The disk, whether it may be used or not."""
        return Room(DISK, self.disk_bytes)


def rooms(
    machine: Machine,
    options: LoadOptions,
    *,
    working_bytes: int,
    gpu_fixed_bytes: int,
    ram_fixed_bytes: int,
    may_spill: bool,
    may_disk: bool,
    quantizes: bool,
    disk_bytes: int | None = None,
) -> Rooms:
    """The room that the options leave on the machine.

    gpu_memory bounds the whole of what a GPU holds. cpu_memory bounds weights, KV cache and working memory; the
    process itself, which no option makes smaller, comes on top. Neither can give more than is free. Layers that are
    quantized while loading lie beside a GPU only where the user lets them: they stay in 16 bit there.
    """
    caps = gpu_caps(machine, options)
    gpus = tuple(Room(str(index), cap, working_bytes, gpu_fixed_bytes) for index, cap in caps.items())
    asked = int(options.cpu_memory * GIB) + ram_fixed_bytes if options.cpu_memory else machine.ram_free_bytes
    ram = Room(CPU, min(asked, machine.ram_free_bytes), 0 if gpus else working_bytes, ram_fixed_bytes)
    wanted = bool(options.disk or options.cpu_memory or options.auto_devices)
    return Rooms(
        gpus=gpus,
        ram=ram,
        spill=bool(gpus) and may_spill and (wanted or not quantizes),
        disk=options.disk and may_disk and (bool(gpus) or not quantizes),
        disk_bytes=disk_bytes,
    )


def gpu_caps(machine: Machine, options: LoadOptions) -> dict[int, int]:
    """GPU → bytes it may hold at most. Left out: one that is full, or that gpu_memory gives 0 or does not come to."""
    found: dict[int, int] = {}
    for position in allowed_gpus(options, len(machine.gpus)):
        cap = machine.gpus[position].free_bytes
        if options.gpu_memory:
            cap = min(cap, int(options.gpu_memory[position] * GIB))
        if cap > 0:
            found[position] = cap
    return found
