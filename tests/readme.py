"""README's generated parts. ``python -m tests.readme`` writes them; ``--check`` fails where they are out of date."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from modules.errors import LoadstoneError, UserError, error_classes
from modules.options import (
    COMMAND_OPTIONS,
    GENERATION_OPTIONS,
    GROUPS,
    LOAD_OPTIONS,
    SERVER_OPTIONS,
    TRAINING_OPTIONS,
    Spec,
)
from tests.api.openai import conformance
from tests.attacks import listed

README = Path(__file__).resolve().parent.parent / "README.md"


def option_table(specs: Iterable[Spec], *, keys: bool = False) -> str:
    """A Markdown table of options. ``keys``: they stand in a file, and are no flags."""
    rows = [f"| {'key' if keys else 'flag'} | what it does | values | default |", "|---|---|---|---|"]
    for spec in specs:
        values = "on, off" if spec.kind == "flag" else spec.takes
        rows.append(f"| `{spec.flag}` | {_cell(spec.help)} | {_cell(values)} | {_cell(_default(spec))} |")
    return "\n".join(rows)


def _default(spec: Spec) -> str:
    if spec.default_help:
        return spec.default_help
    if spec.kind == "flag":
        return "on" if spec.default else "off"
    return "none" if spec.default in ("", ()) else str(spec.default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def load_tables() -> str:
    """The loader options, a table a group."""
    parts = []
    for group, title in GROUPS.items():
        members = [spec for spec in LOAD_OPTIONS.values() if spec.group == group]
        if members:
            parts.append(f"**{title}**\n\n{option_table(members)}")
    return "\n\n".join(parts)


def troubleshooting() -> str:
    """The error tree: what the card says, and what to change."""
    rows = ["| what it says | kind | what to change |", "|---|---|---|"]
    rows += [
        f"| {_cell(cls.title)} | `{cls.kind}` | {_cell(cls.remedy)} |"
        for cls in error_classes()
        if cls not in (LoadstoneError, UserError) and cls.remedy
    ]
    return "\n".join(rows)


PARTS: Mapping[str, str] = {
    "loader options": load_tables(),
    "generation options": option_table(GENERATION_OPTIONS.values()),
    "server options": option_table(SERVER_OPTIONS.values()),
    "training options": option_table(TRAINING_OPTIONS.values(), keys=True),
    "commands": option_table(COMMAND_OPTIONS.values()),
    "troubleshooting": troubleshooting(),
    "conformance": conformance.table(),
    "attacks": listed.table(),
}


def rendered(text: str) -> str:
    """``text`` with every generated part renewed. Raises ValueError where a part has no place in it."""
    for name, body in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README has no place for {name!r}")
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text, count=1)  # type: ignore[misc]
    return text


def main() -> int:
    text = README.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in sys.argv:
        if new != text:
            print("README.md is out of date: run python -m tests.readme", file=sys.stderr)
            return 1
        return 0
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
