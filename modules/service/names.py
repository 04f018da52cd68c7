"""The names of what a person has made."""

from __future__ import annotations

from pathlib import Path

from modules.errors import OptionError


def folder_name(name: str, what: str) -> str:
    """``name`` as that of a new folder, for a LoRA or a model as ``what`` says. Raises OptionError where it is none."""
    plain = name.strip()
    if not plain:
        raise OptionError(f"The {what} has no name yet.", "Give it one.")
    if plain.startswith(".") or "\0" in plain or "\\" in plain or plain != Path(plain).name:
        raise OptionError(f"{name!r} cannot be the name of a {what}.", "Leave out slashes, and a dot in front.")
    return plain
