"""What a plan keeps in RAM or on disk for something else to compute, and how much longer each token takes for it."""

from __future__ import annotations

from dataclasses import dataclass

from modules.planner.devices import CPU, DISK
from modules.planner.memory import Calibration
from modules.planner.solving import Answer

_PLACES = {CPU: "in RAM", DISK: "on disk"}


@dataclass(frozen=True)
class Offload:
    """``kept``: what lies where, "60 of 80 layers in RAM". ``seconds``: how much longer each token takes, at least."""

    kept: str
    seconds: float

    @property
    def longer(self) -> str:
        return f"{self.seconds:.1f} s" if self.seconds >= 1 else f"{max(1, round(1000 * self.seconds))} ms"


def offload_of(answer: Answer, calibration: Calibration) -> Offload:
    """What the answer keeps elsewhere. All of it comes to where it is computed once a token (accelerate's hooks)."""
    moved = {device.key: device.weights_bytes for device in answer.devices if device.key in _PLACES}
    if not answer.rooms.gpus:
        moved.pop(CPU, None)  # it computes
    seconds = moved.get(DISK, 0) / calibration.disk_bytes_per_s + moved.get(CPU, 0) / calibration.ram_to_gpu_bytes_per_s
    layers = {key: answer.layers_on(key) for key in moved}
    kept = [f"{count} of {answer.layout.layers} layers {_PLACES[key]}" for key, count in layers.items() if count]
    where = next((_PLACES[key] for key in _PLACES if moved.get(key)), _PLACES[CPU])
    return Offload(" and ".join(kept) or f"a part of the model {where}", seconds)
