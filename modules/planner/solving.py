"""One question, answered: how much a model takes with these options, and where it would lie. Pure and quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from modules.devices import Machine
from modules.options import LoadOptions, allowed_gpus
from modules.options.loader import NEVER_ON_DISK, ON_GPUS_ALONE
from modules.planner.adapters import Adapters, with_adapters
from modules.planner.checkpoint import Checkpoint
from modules.planner.devices import CPU, DISK, DevicePlan, Rooms, gpu_caps, rooms
from modules.planner.formats import Classes, Part, Precision, classes, precision_for
from modules.planner.layout import Block, Layout, layout_of
from modules.planner.memory import Calibration, cache_growth_bytes, kv_cache, working_bytes
from modules.planner.placement import Load, Placement, place, usage
from modules.planner.unpacking import unpacked
from modules.precision import UNPACKED, computes_bf16


@dataclass(frozen=True)
class Question:
    """What is to be planned. ``ctx_tokens``: the context that the KV cache is for. ``adapters``: (module, bytes).
    ``search``: as :func:`place` takes it."""

    checkpoint: Checkpoint
    options: LoadOptions
    machine: Machine
    ctx_tokens: int
    calibration: Calibration
    adapters: Adapters = ()
    search: bool = True

    def but(self, **changes: object) -> Question:
        """The same with other options; ``ctx_size`` counts as the context too."""
        context = changes.get("ctx_size", self.ctx_tokens)
        assert isinstance(context, int)
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes), ctx_tokens=context)  # type: ignore[arg-type]

    @cached_property
    def gpus(self) -> int:
        """How many the options let the model touch."""
        return len(gpu_caps(self.machine, self.options))

    @property
    def capability(self) -> tuple[int, int]:
        """The least compute capability of the GPUs that the options allow, as the loader asks for it; (0, 0): not
        known."""
        gpus = self.machine.gpus
        return min((gpus[at].capability for at in allowed_gpus(self.options, len(gpus))), default=(0, 0))

    @cached_property
    def held(self) -> Checkpoint:
        """The checkpoint as the devices hold it: packed weights that nothing here multiplies are unpacked."""
        return unpacked(self.checkpoint) if self.checkpoint.quantization in UNPACKED else self.checkpoint

    @property
    def quantizes(self) -> bool:
        """Whether plain weights are quantized while they are loaded."""
        return not self.checkpoint.quantization and (self.options.load_in_4bit or self.options.load_in_8bit)


@dataclass(frozen=True)
class Answer:
    """Where each block of the layout lies, and what that takes."""

    layout: Layout
    rooms: Rooms
    precision: Precision
    offloaded_precision: Precision  # of what lies in RAM or on disk beside a GPU
    loads: tuple[Load, ...]
    placement: Placement

    @property
    def fits(self) -> bool:
        return not self.placement.missing_bytes

    @property
    def offloads(self) -> bool:
        """Whether a part lies in RAM or on disk beside the GPUs that compute it."""
        return bool(self.rooms.gpus) and not set(self.placement.devices) <= {room.key for room in self.rooms.gpus}

    @cached_property
    def device_map(self) -> dict[str, str]:
        """Module → "cpu", "disk" or the GPU's number; one entry ``""`` where all lies on one device."""
        keys = set(self.placement.devices)
        if len(keys) <= 1:
            return {"": next(iter(keys), CPU)}
        pairs = zip(self.layout.blocks, self.placement.devices, strict=True)
        return {module: key for block, key in pairs for module in block.modules}

    @cached_property
    def devices(self) -> tuple[DevicePlan, ...]:
        """Every device that may be used; the disk only where it is."""
        computing = [room.key for room in self.rooms.gpus] or [CPU]
        used = usage(self.loads, self.placement.devices, computing)
        visiting = {used.main: used.visiting}
        made = []
        for room in (*self.rooms.gpus, self.rooms.ram, self.rooms.store):
            weights, kv = used.weights.get(room.key, 0), used.kv.get(room.key, 0)
            if room.key == DISK and not weights:
                continue
            busy = bool(weights) or room.key == used.main
            made.append(
                DevicePlan(
                    name={CPU: "RAM", DISK: "disk"}.get(room.key, f"GPU {room.key}"),
                    key=room.key,
                    cap_bytes=weights if room.cap_bytes is None else room.cap_bytes,
                    weights_bytes=weights,
                    kv_cache_bytes=kv,
                    working_bytes=room.working_bytes * busy + visiting.get(room.key, 0),
                    fixed_bytes=room.fixed_bytes if busy or room.key == CPU else 0,
                    classes=self._classes(room.key, computing, used.main),
                )
            )
        return tuple(made)

    def _classes(self, key: str, computing: Sequence[str], main: str) -> Classes:
        held = []
        for block, device in zip(self.layout.blocks, self.placement.devices, strict=True):
            if device in computing:
                held += [classes(block.parts, self.precision)] if device == key else []
            elif device == key:
                held.append(classes(_only(block, buffers=False), self.offloaded_precision))
            elif key == main:
                held.append(classes(_only(block, buffers=True), self.offloaded_precision))
        return Classes.sum(held)

    def layers_on(self, key: str) -> int:
        """How many of the decoder's layers lie on a device."""
        pairs = zip(self.layout.blocks, self.placement.devices, strict=True)
        return sum(1 for block, device in pairs if device == key and block.layer >= 0)


def solve(question: Question) -> Answer:
    """Place the model. Takes about a millisecond for a model of a hundred layers whose layout is known."""
    checkpoint, options, calibration = question.held, question.options, question.calibration
    layout = with_adapters(layout_of(checkpoint), question.adapters)
    gpus = question.gpus
    bf16 = computes_bf16(question.capability)
    precision = precision_for(checkpoint, options, gpus, question.machine.cpu_bf16, bf16)
    working = working_bytes(layout, precision, calibration, question.ctx_tokens, options)
    cache = kv_cache(layout, checkpoint.task, precision)
    if not gpus:
        working += cache_growth_bytes(cache, options, question.ctx_tokens)
    process = calibration.ram_beside_gpu_bytes if gpus else calibration.ram_fixed_bytes
    if not gpus and (question.quantizes or checkpoint.quantization == "bitsandbytes"):
        process += calibration.bitsandbytes_ram_bytes
    room = rooms(
        question.machine, options, working_bytes=working,
        gpu_fixed_bytes=max(0, calibration.gpu_fixed_bytes + calibration.gpu_correction_bytes),
        ram_fixed_bytes=max(0, process + calibration.ram_correction_bytes),
        may_spill=checkpoint.quantization not in ON_GPUS_ALONE, may_disk=checkpoint.quantization not in NEVER_ON_DISK,
        quantizes=question.quantizes,
        disk_bytes=_disk_bytes(question),
    )  # fmt: skip
    # bitsandbytes leaves alone what a device map puts beside a GPU.
    offloaded = Precision(precision.dtype) if room.gpus else precision
    kv = [cache.layer_bytes(rank, options, question.ctx_tokens) for rank in range(layout.layers)]
    loads = _loads(layout, precision, offloaded, kv)
    return Answer(layout, room, precision, offloaded, loads, place(loads, room, search=question.search))


def _disk_bytes(question: Question) -> int | None:
    """What may be written to disk; None where there is no bound, or where it is not known, in a folder of one's own."""
    bounded = question.held.written_to_offload and not question.options.disk_cache_dir
    return question.machine.disk_free_bytes if bounded else None


def _loads(layout: Layout, precision: Precision, offloaded: Precision, by_rank: Sequence[int]) -> tuple[Load, ...]:
    """``by_rank``: the bytes of each layer's cache."""
    kvs = (by_rank[layout.layer_ranks[block.layer]] if block.layer >= 0 else 0 for block in layout.blocks)
    weights = _weights(layout, precision, offloaded)
    return tuple(Load(load.held, load.offloaded, kv, load.buffers) for load, kv in zip(weights, kvs, strict=True))


@lru_cache(maxsize=64)
def _weights(layout: Layout, precision: Precision, offloaded: Precision) -> tuple[Load, ...]:
    """The blocks without a cache."""
    sizes: dict[object, Load] = {}  # layers are alike
    for block in layout.blocks:
        if block.signature not in sizes:
            sizes[block.signature] = Load(
                held=classes(block.parts, precision).total,
                offloaded=classes(_only(block, buffers=False), offloaded).total,
                buffers=classes(_only(block, buffers=True), offloaded).total,
            )
    return tuple(sizes[block.signature] for block in layout.blocks)


def _only(block: Block, *, buffers: bool) -> dict[Part, int]:
    return {part: count for part, count in block.parts.items() if part.is_buffer is buffers}
