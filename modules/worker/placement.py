"""Where layers go: the memory options and the machine's facts as ``device_map`` and ``max_memory``. Pure numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from modules.errors import OutOfMemory
from modules.options import LoadOptions
from modules.protocol import LoadOrder

GIB = 1024**3
_SHARE_OF_FREE = 0.9  # the rest is for the allocator's rounding and the work space of a forward pass
_OVERHEAD_BYTES = GIB  # that auto_devices leaves on each GPU beside the context: CUDA's own and activations


@dataclass(frozen=True)
class DeviceFacts:
    """The machine in bytes. ``gpu_free_bytes``: one number a GPU; ``bf16``: whether they compute in bfloat16.

    ``cpu_bf16``: whether the processor has instructions for bfloat16. torch computes in it on every processor, but
    without them a product takes a hundred times as long as in float32.
    """

    gpu_free_bytes: tuple[int, ...] = ()
    bf16: bool = True
    cpu_bf16: bool = True
    ram_free_bytes: int = 0

    def usable(self, options: LoadOptions) -> DeviceFacts:
        """The facts of what the options let the model touch: no GPU with ``cpu``."""
        return dataclasses.replace(self, gpu_free_bytes=(), bf16=True) if options.cpu else self

    @property
    def gpus(self) -> int:
        return len(self.gpu_free_bytes)


@dataclass(frozen=True)
class Sizes:
    """The model in bytes: weights as they will lie in memory (0 = not known), KV cache at the chosen context."""

    weight_bytes: int = 0
    kv_bytes: int = 0


def placement(order: LoadOrder, device: DeviceFacts, sizes: Sizes, quantizes: bool) -> dict[str, Any]:
    """The kwargs that say where layers go. Raises OutOfMemory where they plainly fit nowhere that is allowed."""
    options = order.options
    if order.device_map:
        return _planned(order)
    if device.gpus == 0 and (quantizes or not (options.disk or options.cpu_memory)):
        # bitsandbytes converts everything under this map; layers on disk it would leave as they are.
        return {"device_map": {"": "cpu"}}
    limits: dict[int | str, int] = gpu_limits(options, device, sizes)
    if device.gpus == 0 or not quantizes or offloads(options, device):
        limits["cpu"] = ram_limit(options, device)
    if not options.disk:
        _check_fits(order, limits, sizes)
    arguments: dict[str, Any] = {"device_map": "auto", "max_memory": limits}
    if options.disk:
        arguments["offload_folder"] = order.offload_dir
    return arguments


def _planned(order: LoadOrder) -> dict[str, Any]:
    """The planner's device map, as from_pretrained takes it: GPUs by number."""
    places = {module: int(place) if place.isdigit() else place for module, place in order.device_map.items()}
    folder = {"offload_folder": order.offload_dir} if "disk" in places.values() else {}
    return {"device_map": places, **folder}


def spills(order: LoadOrder, device: DeviceFacts) -> bool:
    """Whether layers may lie in RAM or on disk beside a GPU, by the plan, or where there is none by the options."""
    if order.device_map:
        return device.gpus > 0 and any(not place.isdigit() for place in order.device_map.values())
    return offloads(order.options, device)


def offloads(options: LoadOptions, device: DeviceFacts) -> bool:
    """Whether the user lets layers lie in RAM or on disk beside a GPU."""
    return device.gpus > 0 and (options.disk or options.cpu_memory > 0 or options.auto_devices)


def gpu_limits(options: LoadOptions, device: DeviceFacts, sizes: Sizes) -> dict[int | str, int]:
    """GPU index → bytes that weights may take; a GPU that gpu_memory leaves out is absent."""
    if options.gpu_memory:
        named = zip(options.gpu_memory, device.gpu_free_bytes, strict=False)
        return {index: int(gib * GIB) for index, (gib, _) in enumerate(named) if gib > 0}
    if options.auto_devices and device.gpus:
        reserved = _OVERHEAD_BYTES + sizes.kv_bytes // device.gpus
        return {index: max(0, free - reserved) for index, free in enumerate(device.gpu_free_bytes)}
    return {index: int(free * _SHARE_OF_FREE) for index, free in enumerate(device.gpu_free_bytes)}


def ram_limit(options: LoadOptions, device: DeviceFacts) -> int:
    """Bytes of RAM that weights may take."""
    return int(options.cpu_memory * GIB) if options.cpu_memory else int(device.ram_free_bytes * _SHARE_OF_FREE)


def _check_fits(order: LoadOrder, limits: dict[int | str, int], sizes: Sizes) -> None:
    allowed = sum(limits.values())
    if sizes.weight_bytes > allowed:
        raise OutOfMemory(
            f"The weights of {order.name} take {sizes.weight_bytes / GIB:.2f} GiB; "
            f"{allowed / GIB:.2f} GiB are allowed on this machine's GPUs and RAM.",
            "Turn disk on, raise gpu-memory or cpu-memory, or load in 4-bit.",
            fix={"disk": True},
        )
