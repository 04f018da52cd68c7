"""What an option is: one declaration from which flags, widgets, settings, validation and docs derive.

An options class is a frozen dataclass whose fields are made by :func:`option`. The field's annotation is
its type for readers and type checkers; the :class:`Spec` beside it says the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modules.errors import OptionError
from modules.options.adapters import LEAST_WEIGHT, MOST_WEIGHT, adapter_text, split_adapter
from modules.options.circumstances import Circumstances

# "numbers" are GiB; "adapters" are LoRAs, each a name or name:weight
Kind = Literal["flag", "integer", "number", "text", "choice", "numbers", "names", "adapters"]
Reason = Callable[[Circumstances], str]


def always(_: Circumstances) -> str:
    """The applicability of an option that always applies: no reason against it."""
    return ""


@dataclass(frozen=True)
class Spec:
    """One option, declared. ``applies`` gives the reason why it does not apply, or ``""``.

    ``default_help`` is what the default means where the value alone does not tell (``None`` = what is free).
    ``flag`` is the spelling people know; the other spelling (``-`` for ``_``) is always accepted too.
    ``needs``: the option without which this one means nothing, by name.
    """

    name: str
    kind: Kind
    default: Any
    label: str
    help: str
    group: str
    flag: str
    unit: str = ""
    default_help: str = ""
    effect: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    above_low: bool = False  # low itself is refused
    basic: bool = False  # shown to a newcomer
    in_form: bool = True
    secret: bool = False
    local_only: bool = False  # taken from the command line and from files of this machine only
    applies: Reason = always
    strict: bool = False  # set where it does not apply: refused; otherwise said and left out
    needs: str = ""
    whole: bool = False  # of "names": a text is one of them, whatever blanks and commas it holds; a list gives several
    alone: bool = False  # it is done instead of serving the page, and no other such option beside it

    def parse(self, value: Any) -> Any:
        """``value`` as this option's type. Raises OptionError naming the option, the value and the bound."""
        try:
            parsed = self._converted(value)
        except (TypeError, ValueError, OverflowError):
            shown = "what was given" if self.secret else repr(value)
            raise OptionError(f"{self.flag} takes {self.takes}, not {shown}.") from None
        self._check_choice(parsed)
        for number in parsed if isinstance(parsed, tuple) else (parsed,):
            self._check_bounds(number)
        return parsed

    def _converted(self, value: Any) -> Any:
        """``value`` as this option's type, unchecked. A choice counts whatever its letters' case."""
        if self.kind == "number" and self.unit == "GiB":
            return _gib(value)
        if self.whole and isinstance(value, str):
            return (value,) if value.strip() else ()
        parsed = _PARSERS[self.kind](value)
        if self.kind == "choice":
            return next((choice for choice in self.choices if choice.lower() == parsed.lower()), parsed)
        return parsed

    def _check_choice(self, value: Any) -> None:
        if self.kind == "choice" and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(self.choices)}."
            raise OptionError(f"{self.flag} does not know {value!r}.", hint)

    def _check_bounds(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        too_low = self.low is not None and (value <= self.low if self.above_low else value < self.low)
        too_high = self.high is not None and value > self.high
        if too_low or too_high or not math.isfinite(value):
            raise OptionError(f"{self.flag} takes {self.takes}, not {_in_words(value)}.")

    @property
    def takes(self) -> str:
        """The values it takes, in words: ``a number of at least 1``."""
        words = {
            "flag": "on or off",
            "integer": "a whole number",
            "number": "a number",
            "text": "a text",
            "choice": " or ".join(self.choices),
            "numbers": "numbers",
            "names": "names",
            "adapters": f"names, each NAME or NAME:WEIGHT once, with weights from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}",
        }[self.kind]
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.above_low else 'of at least'} {_in_words(self.low)}")
        if self.high is not None:
            bounds.append(f"up to {_in_words(self.high)}")
        return " ".join([words, " and ".join(bounds), self.unit if bounds or self.kind == "numbers" else ""]).strip()


def _in_words(number: float) -> str:
    """``1,000,000`` and ``0.05``."""
    whole = isinstance(number, int) or (number.is_integer() and abs(number) < 2**53)
    return f"{int(number):,}" if whole else f"{number:g}"


def option(kind: Kind, default: Any, label: str, help: str, *, group: str, flag: str = "", **rest: Any) -> Any:
    """A dataclass field that declares an option. The name is filled in by :func:`specs`."""
    data = dict(kind=kind, default=default, label=label, help=help, group=group, flag=flag, **rest)
    return field(default=default, metadata={"option": data})


def specs(cls: type) -> dict[str, Spec]:
    """The declarations of an options class by name, in order."""
    table = {}
    for item in dataclasses.fields(cls):
        data = dict(item.metadata["option"])
        data["flag"] = data["flag"] or "--" + item.name.replace("_", "-")
        table[item.name] = Spec(name=item.name, **data)
    return table


def parse_values(table: Mapping[str, Spec], values: Mapping[str, Any]) -> dict[str, Any]:
    """Each given value parsed by its option. Raises OptionError for an unknown name, with the nearest, and for two
    values of one option: ``ctx-size`` and ``ctx_size``.
    """
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        spec = find(table, name)
        if spec.name in parsed:
            raise OptionError(f"{spec.name} is given twice.", "Give it once.")
        parsed[spec.name] = spec.parse(value)
    return parsed


def find(table: Mapping[str, Spec], name: str) -> Spec:
    """The option of that name; ``-`` counts as ``_``. Raises OptionError with the nearest names."""
    key = name.strip().lstrip("-").replace("-", "_")
    if key in table:
        return table[key]
    near = difflib.get_close_matches(key, table, n=2, cutoff=0.5)
    raise OptionError(f"There is no option {name!r}.", f"Did you mean {' or '.join(near)}?" if near else "")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    number = int(value)
    if abs(number) >= 2**64:  # no option counts so far, and floats, in which bounds are shown, end at 2**1024
        raise OverflowError
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


_GIB_SUFFIXES = {"gib": 1.0, "gb": 1.0, "g": 1.0, "mib": 1 / 1024, "mb": 1 / 1024}


def _gib(value: Any) -> float:
    """GiB from a number or from what people's scripts write: ``10``, ``10GiB``, ``3500MiB``."""
    if isinstance(value, str):
        for suffix, factor in _GIB_SUFFIXES.items():
            if value.lower().endswith(suffix):
                return _number(value[: -len(suffix)]) * factor
    return _number(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _items(value: Any) -> Iterable[Any]:
    """A list of items: from a list, or from a text of items set apart by commas or spaces."""
    if value is None:
        return ()
    if isinstance(value, str):
        return value.replace(",", " ").split()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list | tuple):
        return value
    raise TypeError


def _adapters(value: Any) -> tuple[str, ...]:
    """LoRAs in one spelling. A text may also be a JSON list, for names that hold spaces."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    chosen = [split_adapter(_text(item)) for item in _items(value)]
    if len(dict(chosen)) < len(chosen):
        raise ValueError
    return tuple(adapter_text(name, weight) for name, weight in chosen)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "flag": _flag,
    "integer": _integer,
    "number": _number,
    "text": _text,
    "choice": _text,
    "numbers": lambda value: tuple(_gib(item) for item in _items(value)),
    "names": lambda value: tuple(_text(item) for item in _items(value)),
    "adapters": _adapters,
}
