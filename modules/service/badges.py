"""A word on each model of the menu: whether it would fit this machine, and how."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modules.checkpoint import refuse_quantization
from modules.devices import Machine
from modules.errors import LoadstoneError
from modules.library import Library, Model, ModelFacts
from modules.options import LoadOptions, context_tokens
from modules.planner import plan

logger = logging.getLogger(__name__)

# Tried in this order; the first that fits names the badge, the first two only with nothing beside the GPUs.
IN_4BIT = "fits in 4-bit"
_OFFLOAD = "with offload"
_WAYS: Mapping[str, Mapping[str, Any]] = {"fits": {}, IN_4BIT: {"load_in_4bit": True}, _OFFLOAD: {"disk": True}}
_BOUNDS = ("cpu", "gpu_memory", "cpu_memory", "ctx_size", "batch_tokens", "max_batch")
_NOTICED = 1 / 16  # of a device's memory, more or less free: then it is time to look anew
_TOO_LARGE = "too large"
_UNREADABLE = "cannot be read"


def badge(facts: ModelFacts, machine: Machine, usual: LoadOptions | None = None) -> str:
    """``fits``, ``fits in 4-bit``, ``with offload`` or ``too large``, within the bounds that ``usual`` options set.

    Raises UnsupportedModel for a quantization that no loader takes.
    """
    refuse_quantization(facts.model.name, facts.quantization)
    for word, changes in _WAYS.items():
        options = replace(_bounds(usual or LoadOptions()), **changes)
        if options.load_in_4bit and facts.quantization:
            continue
        planned = plan(facts, options, machine, ctx_tokens=context_tokens(options, facts.context_tokens))
        if planned.fits and (word == _OFFLOAD or not planned.offloaded):
            return word
    return _TOO_LARGE


@dataclass(frozen=True)
class _Badge:
    word: str
    place: object  # the time of its folder when its files were looked at
    identity: object  # of those files
    machine: Machine  # for which it was found
    bounds: LoadOptions
    checked: float  # when they were last found to be the same, by the monotonic clock

    def holds(self, machine: Machine, bounds: LoadOptions) -> bool:
        """Whether it was found for such a machine and bounds."""
        return self.bounds == bounds and _alike(self.machine, machine)


class Badges:
    """Badges by model, kept while its files are the same. A slow disk never holds the menu up for long."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[object, _Badge] = {}

    def all(self, machine: Machine, usual: LoadOptions | None = None, budget_s: float = 0.2) -> dict[str, str]:
        """Name → badge for the models that could be looked at in ``budget_s`` seconds; the rest come next time.

        Those that were never looked at, or lie in a folder that changed, come first, then those that were found for
        other memory or bounds, which show their old word until then, then those whose files were compared the longest
        ago: where the time is too short for all, a file written in place is seen a few calls later.
        """
        limit, bounds = time.monotonic() + budget_s, _bounds(usual or LoadOptions())
        models = {_key(model): model for model in self._library.models()}
        known = {key: b for key, b in self._known.items() if key in models and b.place == _place(models[key])}

        def urgency(key: object) -> tuple[int, float]:
            found = known.get(key)
            return (1 + found.holds(machine, bounds), found.checked) if found else (0, 0.0)

        for key in sorted(models, key=urgency):
            if time.monotonic() > limit:
                break
            known[key] = self._checked(models[key], machine, bounds, known.get(key))
        self._known = known
        return {model.name: known[key].word for key, model in models.items() if key in known}

    def _checked(self, model: Model, machine: Machine, bounds: LoadOptions, known: _Badge | None) -> _Badge:
        # Both before the files are read, which may change meanwhile.
        place, identity = _place(model), self._library.identity(model)
        if known and known.identity == identity and known.holds(machine, bounds):
            return replace(known, place=place, checked=time.monotonic())
        return _Badge(self._look(model, machine, bounds), place, identity, machine, bounds, time.monotonic())

    def _look(self, model: Model, machine: Machine, bounds: LoadOptions) -> str:
        try:
            return badge(self._library.facts(model), machine, bounds)
        except LoadstoneError as error:
            return error.title.lower()
        except Exception:  # whatever one model's files hold, the others are in the menu
            logger.warning("The model %s cannot be described", model.name, exc_info=True)
            return _UNREADABLE


def _place(model: Model) -> object:
    """What changes when a file is put in the place of another, by one look."""
    try:
        stat = model.path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _key(model: Model) -> object:
    return model.path, model.file_format


def _bounds(usual: LoadOptions) -> LoadOptions:
    return LoadOptions(**{name: getattr(usual, name) for name in _BOUNDS})


def _alike(one: Machine, other: Machine) -> bool:
    """Whether about as much is free of the same devices."""
    if (one.ram_total_bytes, one.gpu_names) != (other.ram_total_bytes, other.gpu_names):
        return False
    free = [(one.ram_free_bytes, other.ram_free_bytes, one.ram_total_bytes)]
    free += [(a.free_bytes, b.free_bytes, a.total_bytes) for a, b in zip(one.gpus, other.gpus, strict=True)]
    return all(abs(before - now) <= total * _NOTICED for before, now, total in free)
