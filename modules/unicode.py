"""Texts that browsers and programs send, which need not be Unicode."""

from __future__ import annotations

from typing import Any


def well_formed(value: Any) -> Any:
    """The JSON value with U+FFFD in place of each half of a surrogate pair.

    Who cuts a text amid an emoji leaves one. JSON takes it; no tokenizer, file or answer does.
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {well_formed(key): well_formed(one) for key, one in value.items()}
    return [well_formed(one) for one in value] if isinstance(value, list) else value
