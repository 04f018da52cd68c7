"""Plans that learn: what a load was expected to take, what it took, and what the next plan makes of it."""

from __future__ import annotations

import time
from pathlib import Path

from modules.devices import Machine
from modules.measurements import Measurements
from modules.options import LoadOptions, kept_tokens
from modules.planner import DEFAULT, Calibration, Plan
from modules.planner.learning import Measurement, calibrated, device_of, expected, filed
from modules.protocol import Expected, Memory
from modules.service.copied import reads_copy
from modules.supervisor import Loaded

FILE = "memory.json"
_LEAST_BYTES = 64 * 2**20  # a process that holds less has told nothing yet


class Learned:
    """See the module. ``cache_dir``: where the file of measurements and the quantized copies are. ``quantized_cache``:
    whether loads read such copies."""

    def __init__(self, cache_dir: Path, *, quantized_cache: bool = True) -> None:
        self._measurements = Measurements(cache_dir / FILE)
        self._cache_dir = cache_dir
        self._quantized_cache = quantized_cache

    def calibration(self, plan: Plan, options: LoadOptions, machine: Machine) -> Calibration:
        """What this machine's loads make of ``plan``, which was made without them."""
        known = [one for one in self._measurements.all() if one.machine == fingerprint(machine)]
        return calibrated(plan, known, from_copy=self._from_copy(plan, options)) if known else DEFAULT

    def expected(self, plan: Plan, options: LoadOptions, calibration: Calibration) -> tuple[Expected, ...]:
        """What the load is expected to take, for the order."""
        return expected(plan, calibration, from_copy=self._from_copy(plan, options))

    def note(self, loaded: Loaded, memory: Memory, used_tokens: int, machine: Machine) -> None:
        """Keep what ``loaded`` took after ``used_tokens`` of its KV cache. Less than was noted says nothing.

        It is filed by what the worker did: whether there is a copy to read shows when it is opened.
        """
        order = loaded.order
        for one in order.expected:
            measured = _measured(one, memory, machine)
            kind = filed(one.kind, from_copy=loaded.report.from_copy)
            earlier = self._of(order.name, kind, machine)
            this_load = earlier is not None and earlier.time >= loaded.since
            if measured < _LEAST_BYTES or (this_load and earlier and earlier.used_tokens >= used_tokens):
                continue
            planned = one.peak_bytes(used_tokens / max(1, kept_tokens(order.options, order.ctx_tokens)))
            self._measurements.add(
                Measurement(
                    order.name, kind, fingerprint(machine), planned - one.correction_bytes, planned, measured,
                    used_tokens, time.time(),
                )
            )  # fmt: skip

    def last(self, expected: tuple[Expected, ...], machine: Machine) -> tuple[Measurement, ...]:
        """The latest load of the same kind on this machine, by device."""
        known = [one for one in reversed(self._measurements.all()) if one.machine == fingerprint(machine)]
        latest = (next((m for m in known if m.kind == one.kind), None) for one in expected)
        return tuple(found for found in latest if found is not None)

    def _of(self, model: str, kind: str, machine: Machine) -> Measurement | None:
        same = (model, kind, fingerprint(machine))
        return next((m for m in self._measurements.all() if (m.model, m.kind, m.machine) == same), None)

    def _from_copy(self, plan: Plan, options: LoadOptions) -> bool:
        return self._quantized_cache and reads_copy(plan, options, self._cache_dir)


def fingerprint(machine: Machine) -> str:
    """What makes a machine's costs its own: its GPUs and memory. Not its name: a home folder may be shared."""
    return " · ".join([*machine.gpu_names, f"{machine.ram_total_bytes / 2**30:.0f} GiB"])


def _measured(one: Expected, memory: Memory, machine: Machine) -> int:
    """The most that the worker has held; on GPUs with what it holds there beside torch's memory, as the driver says."""
    if device_of(one.kind) == "RAM":
        return memory.peak_rss_bytes
    used = sum(1 for size in memory.gpu_peak_bytes if size)
    if not used:
        return 0
    holders = [holder for gpu in machine.gpus for holder in gpu.holders if memory.pid and holder.pid == memory.pid]
    beside = sum(holder.held_bytes for holder in holders) - sum(memory.gpu_bytes)
    told = beside > 0 and len(holders) >= used and all(holder.held_bytes for holder in holders)
    return sum(memory.gpu_peak_bytes) + (beside if told else used * DEFAULT.gpu_fixed_bytes)
