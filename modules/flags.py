"""The options as command-line flags. Imports nothing but options and errors, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from modules.errors import OptionError
from modules.options import (
    COMMAND_OPTIONS,
    GENERATION_OPTIONS,
    GROUPS,
    LOAD_OPTIONS,
    SERVER_OPTIONS,
    CommandOptions,
    ServerOptions,
    Spec,
)
from modules.options.server import GROUPS as SERVER_GROUPS

_TITLES: Mapping[str, str] = {**GROUPS, "generation": "Generation", **SERVER_GROUPS}
_TABLES: tuple[Mapping[str, Spec], ...] = (LOAD_OPTIONS, GENERATION_OPTIONS, SERVER_OPTIONS, COMMAND_OPTIONS)
_ALL: Mapping[str, Spec] = {name: spec for table in _TABLES for name, spec in table.items()}


@dataclass(frozen=True)
class Help:
    """Help was asked for."""

    text: str


@dataclass(frozen=True)
class Parsed:
    """The values that were given, and only those."""

    load: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    command: dict[str, Any] = field(default_factory=dict)

    def server_options(self, lower: Mapping[str, Any]) -> ServerOptions:
        """The server options over those of a settings file."""
        return ServerOptions(**{**lower, **self.server})

    def command_options(self) -> CommandOptions:
        """Raises OptionError for two commands, and for what belongs to a command that is not given."""
        given = [COMMAND_OPTIONS[name] for name, value in self.command.items() if value is not False]
        names = {spec.name for spec in given}
        if len(several := [spec.flag for spec in given if spec.alone]) > 1:
            raise OptionError(f"{' and '.join(several)} are {len(several)} commands.", "Give one of them.")
        for spec in given:
            if spec.needs and spec.needs not in names:
                needed = COMMAND_OPTIONS[spec.needs].flag
                raise OptionError(f"{spec.flag} means nothing without {needed}.", f"Give {needed} too.")
        return CommandOptions(**self.command)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message[:1].upper()}{message[1:]}.", "./start.sh --help lists the flags.")


def parse(argv: Sequence[str]) -> Parsed | Help:
    """The flags in ``argv``. Raises OptionError, with the nearest flags for one that is not known."""
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    if getattr(given, "help", False):
        return Help(parser.format_help())
    if unknown:
        raise _unknown(unknown[0])
    values = {name: _value(_ALL[name], value) for name, value in vars(given).items()}
    return Parsed(*({name: value for name, value in values.items() if name in table} for table in _TABLES))


def _value(spec: Spec, words: Any) -> Any:
    # Several words of numbers may themselves be lists, "10,6"; a name may hold spaces and stays as it is.
    return spec.parse(" ".join(words) if spec.kind == "numbers" else words)


def _unknown(word: str) -> OptionError:
    if not word.startswith("-"):
        return OptionError(f"{word!r} belongs to no flag.", "A text with spaces needs quotation marks.")
    flag = word.split("=")[0].replace("_", "-").lower()
    known = {spelling.replace("_", "-"): spec.flag for spec in _ALL.values() for spelling in _spellings(spec)}
    near = [known[match] for match in difflib.get_close_matches(flag, known, n=2, cutoff=0.6)]
    return OptionError(
        f"There is no flag {word.split('=')[0]}.", f"Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    )


def _parser() -> _Parser:
    parser = _Parser(
        prog="server.py", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Load language models, in the browser and from the command line.",
        usage="server.py [--model NAME] [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    for group, title in _TITLES.items():
        section = parser.add_argument_group(title)
        for spec in _ALL.values():
            if spec.group == group:
                _add(section, spec)
    return parser


def _spellings(spec: Spec) -> list[str]:
    """The flag as people know it first, then the other spelling."""
    return _both_ways(spec.flag)


def _both_ways(flag: str) -> list[str]:
    return list(dict.fromkeys([flag, flag.replace("_", "-"), "--" + flag[2:].replace("-", "_")]))


def _add(group: argparse._ArgumentGroup, spec: Spec) -> None:
    spellings, text = _spellings(spec), _help(spec)
    if spec.kind == "flag":
        off = _both_ways(f"--no{'_' if '_' in spec.flag else '-'}{spec.flag[2:]}")
        on_help, off_help = (argparse.SUPPRESS, text) if spec.default else (text, argparse.SUPPRESS)
        group.add_argument(*spellings, dest=spec.name, action="store_true", help=on_help)
        group.add_argument(*off, dest=spec.name, action="store_false", help=off_help)
        return
    names = {"nargs": "+", "action": "extend"}
    several = {"numbers": {"nargs": "+"}, "names": names, "adapters": names}.get(spec.kind, {})
    rest: dict[str, Any] = {"dest": spec.name, "metavar": _metavar(spec), "help": text, **several}
    group.add_argument(*spellings, **rest)


def _metavar(spec: Spec) -> str:
    if spec.kind == "choice":
        return "|".join(spec.choices)
    return (spec.unit or {"text": "TEXT", "names": "NAME", "adapters": "NAME:WEIGHT"}.get(spec.kind, "N")).upper()


def _help(spec: Spec) -> str:
    """Of what is on by itself, the flag that is shown turns it off."""
    if spec.default is True:
        return f"Turns off: {spec.help}".replace("%", "%%")
    default = spec.default_help or ("" if spec.default in (False, "", ()) else spec.default)
    return f"{spec.help}{f' (default: {default})' if default != '' else ''}".replace("%", "%%")
