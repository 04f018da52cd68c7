"""A word on each model of the menu: whether it would fit this machine, and how."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

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
_WAYS: Mapping[str, LoadOptions] = {
    "fits": LoadOptions(),
    IN_4BIT: LoadOptions(load_in_4bit=True),
    _OFFLOAD: LoadOptions(disk=True),
}
_TOO_LARGE = "too large"
_UNREADABLE = "cannot be read"


def badge(facts: ModelFacts, machine: Machine) -> str:
    """``fits``, ``fits in 4-bit``, ``with offload`` or ``too large``.

    Raises UnsupportedModel for a quantization that no loader takes.
    """
    refuse_quantization(facts.model.name, facts.quantization)
    for word, options in _WAYS.items():
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
    checked: float  # when they were last found to be the same, by the monotonic clock


class Badges:
    """Badges by model, kept while its files are the same. A slow disk never holds the menu up for long."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[object, _Badge] = {}

    def all(self, machine: Machine, budget_s: float = 0.2) -> dict[str, str]:
        """Name → badge for the models that could be looked at in ``budget_s`` seconds; the rest come next time.

        Those that were never looked at, or lie in a folder that changed, come first, then those whose files were
        compared the longest ago: where the time is too short for all, a file written in place is seen a few calls
        later.
        """
        limit = time.monotonic() + budget_s
        models = {_key(model, machine): model for model in self._library.models()}
        known = {key: b for key, b in self._known.items() if key in models and b.place == _place(models[key])}
        for key in sorted(models, key=lambda key: known[key].checked if key in known else 0.0):
            if time.monotonic() > limit:
                break
            known[key] = self._checked(models[key], machine, known.get(key))
        self._known = known
        return {model.name: known[key].word for key, model in models.items() if key in known}

    def _checked(self, model: Model, machine: Machine, known: _Badge | None) -> _Badge:
        # Both before the files are read, which may change meanwhile.
        place, identity = _place(model), self._library.identity(model)
        same = known is not None and known.identity == identity
        return _Badge(known.word if known and same else self._look(model, machine), place, identity, time.monotonic())

    def _look(self, model: Model, machine: Machine) -> str:
        try:
            return badge(self._library.facts(model), machine)
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


def _key(model: Model, machine: Machine) -> object:
    return model.path, model.file_format, machine.ram_total_bytes, machine.gpu_names
