"""What the page and the command line show of a model before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modules.errors import LoadstoneError
from modules.library import ModelFacts
from modules.options import LoadOptions
from modules.service.fit import Fit
from modules.service.loras import LoraPlan


@dataclass(frozen=True)
class View:
    """One model with the options that a load would get now, and what can be said of it before loading."""

    name: str
    facts: ModelFacts | None
    options: LoadOptions
    origin: Mapping[str, str]  # option → the layer that its value came from
    reasons: Mapping[str, str]  # option → why it does not apply; only those
    notes: tuple[str, ...] = ()
    problem: LoadstoneError | None = None  # what a load with these options would be refused for
    fit: Fit | None = None
    context_tokens: int = 0
    code_allowed: bool = False  # to run with these options
    code_approved: bool = False  # somebody has said yes to exactly its files; the option may be off all the same
    loras: LoraPlan = field(default_factory=LoraPlan)
