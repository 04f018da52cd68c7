"""Which GPUs the process of a training sees: those that its model lies on. Imports no ML package."""

from __future__ import annotations

import os
from dataclasses import replace

from modules.protocol import LoadOrder


def with_own_gpus(order: LoadOrder) -> LoadOrder:
    """Hide every GPU from this process that the model does not lie on; the order with the numbers that the rest get.

    The Trainer trains on the first GPU that it sees (accelerate 1.15): a model in 4-bit or 8-bit that lies on another
    is refused, one in 16-bit is moved there, and either takes a context there. To be called before torch is imported.
    """
    gpus = sorted({int(place) for place in order.device_map.values() if place.isdigit()})
    if not gpus and not order.device_map and not order.options.cpu:
        return order  # placed when it is loaded
    if order.options.cpu:
        gpus = []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown is not None else [str(gpu) for gpu in range(max(gpus, default=0) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu].strip() for gpu in gpus if gpu < len(names))
    numbers = {str(gpu): str(number) for number, gpu in enumerate(gpus)}
    return replace(order, device_map={key: numbers.get(place, place) for key, place in order.device_map.items()})
