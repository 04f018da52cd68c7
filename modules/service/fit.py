"""The plan of a load beside what is loaded now: whether the old model can stay until the new one is ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modules.devices import Machine
from modules.errors import OutOfMemory
from modules.library import ModelFacts
from modules.options import LoadOptions
from modules.planner import DEFAULT, Plan, plan
from modules.planner.adapters import Adapters
from modules.planner.learning import Measurement
from modules.protocol import Expected
from modules.service.learned import Learned
from modules.supervisor import Loaded
from modules.units import format_bytes

_BESIDE_SHARE = 0.9  # of what is free may be planned for a second model: the first one's context may still grow


@dataclass(frozen=True)
class Fit:
    """``plan`` is for the machine as it will be when the model loads. ``beside``: what is loaded stays meanwhile.
    ``spared_by``: the model without which less of it would lie in RAM or on disk; "" = none."""

    plan: Plan
    beside: bool = False
    ends: tuple[str, ...] = ()  # the models that are unloaded first to make room, the model itself among them
    spared_by: str = ""
    expected: tuple[Expected, ...] = ()
    last: tuple[Measurement, ...] = ()  # what the last load of this kind took, by device

    @property
    def fits(self) -> bool:
        return self.plan.fits

    @property
    def verdict(self) -> str:
        """It fits, with what beside the GPUs, and what more would; or what is missing where."""
        if not self.fits:
            return f"Too large: {format_bytes(self.plan.missing_bytes)} more are needed on {self.plan.missing_on}."
        longest = self.plan.ctx_tokens + self.plan.spare_context_tokens
        more = f" A context of up to {longest:,} tokens would fit too." if self.plan.spare_context_tokens else ""
        others = [name for name in self.ends if name != self.plan.model]
        first = f" {' and '.join(others)} {'are' if others[1:] else 'is'} unloaded first." if others else ""
        slow = f", with {self.plan.offloaded}" if self.plan.offloaded else ""
        spared = f" With {self.spared_by} unloaded, less of it would." if self.spared_by else ""
        return f"Fits{slow}.{spared}{first}{more}"


def fit_of(
    facts: ModelFacts, options: LoadOptions, ctx_tokens: int, machine: Machine, loaded: Sequence[Loaded],
    adapters: Adapters = (), learned: Learned | None = None, *, replaces: bool = False,
) -> Fit:  # fmt: skip
    """The plan beside all that is ``loaded`` where that surely fits, else for when as few of it as will do have ended,
    from the front; where nothing will do, for when all have.

    ``learned``: what earlier loads have taught; None: nothing. ``replaces``: the first of ``loaded`` ends in any case,
    and so ends first where more of the new one would lie in RAM or on disk beside it.
    """

    def planned(on: Machine, **rest: Any) -> Fit:
        made = plan(facts, options, on, ctx_tokens=ctx_tokens, adapters=adapters)
        if learned is None:
            return Fit(made, **rest)
        calibration = learned.calibration(made, options, machine)
        if calibration != DEFAULT:
            made = plan(facts, options, on, ctx_tokens=ctx_tokens, adapters=adapters, calibration=calibration)
        expected = learned.expected(made, options, calibration)
        return Fit(made, expected=expected, last=learned.last(expected, machine), **rest)

    if not loaded:
        return planned(machine)
    beside = planned(_with_less(machine), beside=True)
    if beside.fits and not beside.plan.away_bytes:
        return beside
    for count in range(1, len(loaded) + 1):
        machine = without(machine, loaded[count - 1])
        left = count < len(loaded)
        fit = planned(_with_less(machine) if left else machine, ends=tuple(one.order.name for one in loaded[:count]))
        if beside.fits:
            return _better(beside, fit, replaces=replaces)
        if fit.fits:
            break
    return fit


def _better(beside: Fit, ended: Fit, *, replaces: bool) -> Fit:
    """Of two that may fit: beside a model with a part in RAM or on disk, and with that model ended."""
    if not ended.fits or ended.plan.away_bytes >= beside.plan.away_bytes:
        return beside
    return ended if replaces else replace(beside, spared_by=ended.ends[0])


def without(machine: Machine, *loaded: Loaded) -> Machine:
    """The machine as it were if these had ended."""
    for one in loaded:
        machine = _without(machine, one)
    return machine


def _without(machine: Machine, loaded: Loaded) -> Machine:
    held = dict(enumerate(loaded.memory_at_load.gpu_bytes))
    gpus = tuple(
        replace(gpu, free_bytes=min(gpu.total_bytes, gpu.free_bytes + held.get(place, 0)))
        for place, gpu in enumerate(machine.gpus)
    )
    ram = min(machine.ram_total_bytes, machine.ram_free_bytes + loaded.memory_at_load.rss_bytes)
    return replace(machine, gpus=gpus, ram_free_bytes=ram)


def _with_less(machine: Machine) -> Machine:
    gpus = tuple(replace(gpu, free_bytes=int(gpu.free_bytes * _BESIDE_SHARE)) for gpu in machine.gpus)
    return replace(machine, gpus=gpus, ram_free_bytes=int(machine.ram_free_bytes * _BESIDE_SHARE))


def refusal(fit: Fit) -> OutOfMemory:
    """What a load that cannot fit is refused with: what is missing, what would help, the first of it as a fix."""
    plan_ = fit.plan
    device = next((device for device in plan_.devices if device.name == plan_.missing_on), plan_.devices[0])
    ways = [suggestion.text for suggestion in plan_.suggestions]
    fix = next((suggestion.options for suggestion in plan_.suggestions if suggestion.options), {})
    return OutOfMemory(
        f"{plan_.model} does not fit: {format_bytes(plan_.missing_bytes)} are missing on {device.name} "
        f"({format_bytes(device.total_bytes)} needed, {format_bytes(device.cap_bytes)} allowed).",
        " Or: ".join(ways) if ways else "",
        fix=fix,
    )
