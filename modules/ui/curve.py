"""A training's curve as SVG: the loss of each step, the evaluations, and the learning rate under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from modules.training.messages import TrainEvaluation, TrainStep

# In units of the picture, which is as wide as its column.
_WIDTH, _HEIGHT = 420, 238
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 10, 164  # of the loss
_RATE_TOP, _RATE_BOTTOM = 190, 216  # of the learning rate
_TICKS = 4
_OUTLIERS = 0.02  # the share of the highest losses that may be drawn at the upper edge

Points = Sequence[tuple[float, float]]


def curve(steps: Sequence[TrainStep], evaluations: Sequence[TrainEvaluation], total_steps: int) -> str:
    """The picture; "" before the first step. Lines differ by pattern and mark too, not by colour alone."""
    if not steps:
        return ""
    last = max(total_steps, steps[-1].step, 1)
    top = _top([step.loss for step in steps if math.isfinite(step.loss)], [one.loss for one in evaluations])
    loss = [_place(step.step, step.loss, last, top, _TOP, _BOTTOM) for step in steps if math.isfinite(step.loss)]
    drawn = [one for one in evaluations if math.isfinite(one.loss)]
    checks = [_place(one.step, one.loss, last, top, _TOP, _BOTTOM) for one in drawn]
    highest_rate = max(step.learning_rate for step in steps) or 1.0
    rate = [_place(s.step, s.learning_rate, last, highest_rate, _RATE_TOP, _RATE_BOTTOM) for s in steps]
    return (
        f'<figure class="curve"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(_in_words(steps, evaluations))}">'
        f"{_axes(last, top)}{_line(rate, 'rate')}{_line(loss, 'loss')}{_line(checks, 'check')}"
        f"{''.join(_mark(one, at) for one, at in zip(drawn, checks, strict=True))}"
        f'<text class="tick" x="{_LEFT + 4}" y="{_RATE_TOP - 6}">learning rate</text></svg>'
        f"<figcaption>{_legend(bool(checks))}</figcaption></figure>"
    )


def _top(losses: Sequence[float], checks: Sequence[float]) -> float:
    """The upper edge. A few outliers, as of the first steps of a high learning rate, do not flatten the rest."""
    ordered = sorted(losses)
    usual = ordered[max(0, math.ceil(len(ordered) * (1 - _OUTLIERS)) - 1)] if ordered else 0.0
    return _round_up(max(usual, *[value for value in checks if math.isfinite(value)], 1e-3))


def _round_up(value: float) -> float:
    """The next 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next((unit * size for size in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if unit * size >= value), value)


def _place(step: float, value: float, last: int, top: float, upper: int, lower: int) -> tuple[float, float]:
    x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
    return x, lower - (lower - upper) * min(1.0, max(0.0, value / top))


def _line(points: Points, css: str) -> str:
    if len(points) == 1 and css != "check":
        points = [points[0], (points[0][0] + 2, points[0][1])]  # one point alone would not be seen
    return f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _mark(one: TrainEvaluation, at: tuple[float, float]) -> str:
    x, y = at
    size = 3.5 if one.best else 2.2
    words = f"evaluation at step {one.step:,}: {one.loss:.3f}{', the best so far' if one.best else ''}"
    return (
        f'<rect class="check{" best" if one.best else ""}" x="{x - size:.1f}" y="{y - size:.1f}" '
        f'width="{2 * size}" height="{2 * size}"><title>{words}</title></rect>'
    )


def _axes(last: int, top: float) -> str:
    parts = []
    for tick in range(_TICKS + 1):
        y = _BOTTOM - (_BOTTOM - _TOP) * tick / _TICKS
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{_LEFT - 4}" y="{y + 4:.1f}">{top * tick / _TICKS:.3g}</text>'
        )
    for step in sorted({0, last // 2, last}):
        x, _ = _place(step, 0, last, 1, _TOP, _BOTTOM)
        anchor = "end" if step == last else "start" if step == 0 else "middle"
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{_HEIGHT - 8}">{step:,}</text>')
    return "".join(parts)


def _legend(checks: bool) -> str:
    line = '<svg viewBox="0 0 22 8" aria-hidden="true">{}</svg>'
    entries = [line.format('<polyline class="loss" points="0,4 22,4"/>') + " loss of each step"]
    if checks:
        sign = '<polyline class="check" points="0,4 22,4"/><rect class="check best" x="8" y="1" width="6" height="6"/>'
        entries.append(line.format(sign) + " evaluation, best ones larger")
    entries.append("steps to the right")
    return " · ".join(entries)


def _in_words(steps: Sequence[TrainStep], evaluations: Sequence[TrainEvaluation]) -> str:
    """The curve for who does not see it."""
    first, now = steps[0], steps[-1]
    text = f"Loss {first.loss:.3f} at step {first.step:,}, {now.loss:.3f} at step {now.step:,}."
    best = min(evaluations, key=lambda one: one.loss, default=None)
    return text + (f" Best evaluation {best.loss:.3f} at step {best.step:,}." if best else "")
