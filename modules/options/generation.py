"""The generation options: how the next token is chosen, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

from modules.options.spec import option, specs


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer one prompt. Every message of a chat may carry its own."""

    max_new_tokens: int = option(
        "integer", 512, "Length", "The most tokens to answer with.",
        group="generation", unit="tokens", low=1, high=1_000_000, step=1, basic=True,
    )  # fmt: skip
    temperature: float = option(
        "number", 0.7, "Temperature", "How freely to choose: 0 always takes the likeliest token.",
        group="generation", low=0, high=5, step=0.05, basic=True,
    )  # fmt: skip
    top_p: float = option(
        "number", 0.9, "top-p", "Choose among the likeliest tokens that together have this probability. 1 is off.",
        group="generation", low=0, high=1, step=0.01, above_low=True, basic=True,
    )  # fmt: skip
    top_k: int = option(
        "integer", 0, "top-k", "Choose among this many of the likeliest tokens. 0 is off.",
        group="generation", low=0, high=1000, step=1,
    )  # fmt: skip
    min_p: float = option(
        "number", 0.0, "min-p", "Drop tokens less likely than this share of the likeliest one's probability. 0 is off.",
        group="generation", low=0, high=1, step=0.01,
    )  # fmt: skip
    repetition_penalty: float = option(
        "number", 1.0, "Repetition penalty", "Make tokens that have been used less likely. 1 is off.",
        group="generation", low=1, high=3, step=0.01,
    )  # fmt: skip
    seed: int = option(
        "integer", -1, "Seed", "The same seed gives the same answer. -1 takes a new one each time.",
        group="generation", low=-1, high=2**63 - 1, step=1,
    )  # fmt: skip


GENERATION_OPTIONS = specs(GenerationOptions)
