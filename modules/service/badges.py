"""A word on each model of the menu: whether it would fit this machine, and how."""

from __future__ import annotations

import time
from collections.abc import Mapping

from modules.devices import Machine
from modules.errors import LoadstoneError
from modules.library import Library, ModelFacts
from modules.options import LoadOptions, context_tokens
from modules.planner import plan

# Tried in this order; the first that fits names the badge.
_WAYS: Mapping[str, LoadOptions] = {
    "fits": LoadOptions(),
    "fits in 4-bit": LoadOptions(load_in_4bit=True),
    "with offload": LoadOptions(disk=True),
}
_TOO_LARGE = "too large"


def badge(facts: ModelFacts, machine: Machine) -> str:
    """``fits``, ``fits in 4-bit``, ``with offload`` or ``too large``."""
    for word, options in _WAYS.items():
        if options.load_in_4bit and facts.quantization:
            continue
        if plan(facts, options, machine, ctx_tokens=context_tokens(options, facts.context_tokens)).fits:
            return word
    return _TOO_LARGE


class Badges:
    """Badges by model path, kept while the files are the same. A slow disk never holds the menu up for long."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[object, str] = {}

    def all(self, machine: Machine, budget_s: float = 0.2) -> dict[str, str]:
        """Name → badge for the models that could be looked at in ``budget_s`` seconds; the rest come next time."""
        limit = time.monotonic() + budget_s
        found: dict[str, str] = {}
        for model in self._library.models():
            key = (model.path, model.file_format, machine.ram_total_bytes, machine.gpu_names)
            if key not in self._known:
                if time.monotonic() > limit:
                    continue
                self._known[key] = self._look(model.name, machine)
            found[model.name] = self._known[key]
        return found

    def _look(self, name: str, machine: Machine) -> str:
        try:
            return badge(self._library.facts(name), machine)
        except LoadstoneError as error:
            return error.title.lower()
