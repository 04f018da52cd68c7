"""The names of what a person has made."""

from __future__ import annotations

import re
from pathlib import Path

from modules.errors import OptionError
from modules.library.scan import UNFINISHED

_MOST_BYTES = 200  # file systems take 255, and a name gets endings while its folder is written
_SIGNS = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')  # Windows takes none of them; a colon also stands before a LoRA's weight
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows, in every folder


def folder_name(name: str, what: str) -> str:
    """``name`` as that of a new folder, for a LoRA or a model as ``what`` says. Raises OptionError where it is none."""
    plain = name.strip()
    if not plain:
        raise OptionError(f"The {what} has no name yet.", "Give it one.")
    if plain.startswith(".") or "\0" in plain or "\\" in plain or plain != Path(plain).name:
        raise OptionError(f"{name!r} cannot be the name of a {what}.", "Leave out slashes, and a dot in front.")
    if _SIGNS.search(plain) or plain.endswith(".") or _DEVICES.fullmatch(plain):
        raise OptionError(
            f"{name!r} cannot be the name of a {what} on every system.", "Use letters, digits, spaces, - and _."
        )
    if plain.lower().endswith(UNFINISHED):
        raise OptionError(f"{name!r} is named like a download under way, which no menu shows.", "Leave out the ending.")
    if len(plain.encode(errors="surrogatepass")) > _MOST_BYTES:
        raise OptionError(f"The name of the {what} is too long.", f"{_MOST_BYTES} bytes are the most.")
    return plain
