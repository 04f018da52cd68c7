"""What a button says that loads with the options which mend an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS, PRECISIONS, LoadOptions, Spec
from modules.ui.form import PRECISION_OPTIONS, widget_value


def fix_label(error: LoadstoneError | None, options: LoadOptions | None = None) -> str:
    """``Load in 4-bit instead``; ``""`` where nothing mends the error. ``options``: those that it came with."""
    fix = {name: value for name, value in (error.fix if error else {}).items() if name in LOAD_OPTIONS}
    if not fix:
        return ""
    precision = next((word for word, flags in PRECISIONS.items() if any(fix.get(name) for name in flags)), "")
    if precision:
        fix = {name: value for name, value in fix.items() if name not in PRECISION_OPTIONS}
    words = [f"in {precision}"] if precision else []
    words += [_changed(LOAD_OPTIONS[name], value) for name, value in _told(fix, options, alone=not precision).items()]
    return f"Load {' and '.join(words)} instead"


def _told(fix: Mapping[str, Any], options: LoadOptions | None, *, alone: bool) -> Mapping[str, Any]:
    """What of the fix is worth saying: not what is so already, nor what another change turns off with it.

    ``alone``: nothing else is said, so that something has to be.
    """
    news = {name: value for name, value in fix.items() if options is None or value != getattr(options, name)}
    told = {name: value for name, value in news.items() if value != LOAD_OPTIONS[name].default}
    return told or (news or fix if alone else {})


def _changed(spec: Spec, value: Any) -> str:
    label = spec.label if spec.label[:2].isupper() else spec.label[0].lower() + spec.label[1:]
    if spec.kind == "flag":
        return f"{'with' if value else 'without'} {label}"
    shown = _shown(spec, value)
    return f"with {label} {shown}" if shown else f"with no {label} set"


def _shown(spec: Spec, value: Any) -> str:
    """A value with its unit; "" for one that is left to the program."""
    shown = widget_value(spec, value)
    if shown is None or shown == "":
        return ""
    if spec.unit == "GiB" and isinstance(value, float):
        shown = f"{math.floor(value * 10) / 10:g}"  # what is allowed is never less than what is said
    elif isinstance(value, int | float):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return f"{shown} {spec.unit}".strip()
