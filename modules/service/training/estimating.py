"""What a training would take beside what runs now, in memory and in time; and how fast earlier ones were."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from modules.devices import Machine
from modules.library import ModelFacts
from modules.options import LoadOptions, TrainingOptions
from modules.planner.training import TrainingPlan, training_plan, training_seconds
from modules.service.fit import without
from modules.service.training.state import Estimate, TrainState
from modules.supervisor import Loaded
from modules.training import runs
from modules.training.messages import Preview
from modules.units import format_bytes

_KEPT = 50
_ROOM_SHARE = 0.95  # of what is free may be planned beside a model that answers


def estimate(
    facts: ModelFacts, load: LoadOptions, training: TrainingOptions, longest: int, preview: Preview | None,
    machine: Machine, loaded: Loaded | None, pace: Pace, device_map: Mapping[str, str],
) -> Estimate:  # fmt: skip
    """Beside ``loaded`` where that fits, else with it gone. ``longest``: example, in tokens. Without ``preview`` the
    time is not known."""
    beside = training_plan(facts, load, training, machine, longest, device_map)
    stays = loaded is None or beside.total_bytes <= beside.free_bytes * _ROOM_SHARE
    made = beside
    if not stays and loaded is not None:
        made = training_plan(facts, load, training, without(machine, loaded), longest, device_map)
    notes = []
    if loaded is not None and stays:
        notes.append(f"{loaded.order.name} stays loaded and answers meanwhile, more slowly.")
    return Estimate(
        fits=made.fits, total_bytes=made.total_bytes, free_bytes=made.free_bytes, on=made.on, parts=made.parts,
        beside=stays, ends_first=loaded.order.name if loaded and not stays and made.fits else "",
        parameters=made.parameters, seconds=_seconds(facts, load, training, preview, pace), notes=tuple(notes),
        suggestions=() if made.fits else tuple(_ways(facts, load, training, machine, longest, made, device_map)),
    )  # fmt: skip


def _seconds(
    facts: ModelFacts, load: LoadOptions, training: TrainingOptions, preview: Preview | None, pace: Pace
) -> float | None:
    if preview is None or not preview.counted:
        return None
    tokens = preview.tokens / preview.counted * preview.steps * training.batch_size * training.accumulation
    if training.packing:
        tokens = float(preview.steps * training.batch_size * training.accumulation * training.cutoff)
    rate = pace.of(pace_kind(facts.model.name, load, training))
    return training_seconds(facts, training, int(tokens), preview.matmul_flops, rate)


def _ways(
    facts: ModelFacts, load: LoadOptions, training: TrainingOptions, machine: Machine, longest: int, now: TrainingPlan,
    device_map: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """What would make it fit, in words."""
    tries: list[tuple[str, LoadOptions, TrainingOptions]] = [
        ("turn gradient_checkpointing on", load, replace(training, gradient_checkpointing=True)),
        ("set batch_size to 1", load, replace(training, batch_size=1)),
        ("halve the cut-off", load, replace(training, cutoff=max(8, training.cutoff // 2))),
        ("do both", load, replace(training, gradient_checkpointing=True, batch_size=1)),
    ]
    if not facts.quantization and not load.load_in_4bit:
        tries.append(("load the model in 4-bit", replace(load, load_in_4bit=True, load_in_8bit=False), training))
    ways = []
    for words, loading, options in tries:
        placed = device_map if loading is load else {}  # loaded anew, it is placed anew
        made = training_plan(facts, loading, options, machine, longest, placed)
        if made.total_bytes < now.total_bytes and made.fits:
            ways.append(f"{words} ({format_bytes(made.total_bytes)})")
    return ways or ["load a smaller model"]


def pace_kind(model: str, load: LoadOptions, training: TrainingOptions) -> str:
    """What trainings of one speed have in common."""
    precision = "4-bit" if load.load_in_4bit else "8-bit" if load.load_in_8bit else "bf16" if load.bf16 else "as stored"
    return f"{model} · {precision}{' · checkpointing' if training.gradient_checkpointing else ''}"


class Pace:
    """Tokens per second of earlier trainings, by kind, in a file. One that cannot be read or written is none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()

    def of(self, kind: str) -> float:
        """0 where none was."""
        rate = runs.read_json(self._file).get(kind)
        return float(rate) if isinstance(rate, int | float) else 0.0

    def note(self, state: TrainState) -> None:
        """Keep how fast a training was that is over."""
        order, last = state.order, state.last
        if order is None or last is None or last.tokens_per_second <= 0:
            return
        kind = pace_kind(order.load.name, order.load.options, order.options)
        with self._lock:
            kept = {name: rate for name, rate in runs.read_json(self._file).items() if name != kind}
            rates = dict([*kept.items(), (kind, round(last.tokens_per_second, 1))][-_KEPT:])
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                partial = self._file.with_name(f".{self._file.name}.{os.getpid()}")
                partial.write_text(json.dumps(rates, indent=1), encoding="utf-8")
                os.replace(partial, self._file)
            except OSError:
                pass
