"""The commented settings.yaml, from the table of options. ``python -m tests.settings_example`` writes it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path

from modules.options import GROUPS, Spec
from modules.options.server import GROUPS as SERVER_GROUPS
from modules.settings import FILE_OPTIONS

SETTINGS = Path(__file__).resolve().parent.parent / "settings.yaml"
HEAD = """\
# Defaults of this machine, for every model. Nothing is set here: remove the # before a name to set it.
# What is saved for one model goes before these, flags go before both, and the form before all.
"""
TITLES = {**GROUPS, "generation": "Generation", **SERVER_GROUPS}


def example() -> str:
    """The whole file: every option that it may hold, with its default, commented out."""
    parts = [HEAD]
    for group, title in TITLES.items():
        members = [spec for spec in FILE_OPTIONS.values() if spec.group == group]
        if members:
            parts.append(f"\n# --- {title} ---\n")
            parts += [_entry(spec) for spec in members]
    return "".join(parts)


def _entry(spec: Spec) -> str:
    takes = "true or false" if spec.kind == "flag" else spec.takes
    default = f" Default: {spec.default_help}." if spec.default_help else ""
    text = f"{spec.help} Takes {takes}.{default}"
    value = json.dumps(spec.default)  # which is YAML too
    return f"\n{_commented(textwrap.wrap(text, 116))}#{spec.name}: {value}\n"


def _commented(lines: Iterable[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)


if __name__ == "__main__":
    SETTINGS.write_text(example(), encoding="utf-8")
