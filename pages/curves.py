"""The history of a run as curves: SVG with axes, which needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pages.facts import real, whole
from pages.markup import escape, number

W, H = 420, 220  # of a curve, in units of its SVG
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 12, 40  # margins
MOST = 400  # points of a line: of more, the mean of each so many steps is drawn
SMOOTH = 0.05  # of all points, how many a smooth line averages
DECADE = 10.0
HUGE = 1e30  # what is larger is not drawn


class Curve(NamedTuple):
    """What is drawn of a statistic."""

    key: str  # in history.json
    title: str
    meaning: str
    log: bool = False  # its axis is logarithmic


CURVES = (
    Curve("regulariser", "Loss", "emptiness and centre-depth losses: all that the run adds to the score"),
    Curve("sigma", "Noise level sigma", "at which a step asks for the score", log=True),
    Curve("score", "Score", "root mean square of the step's gradient at the pixels"),
    Curve("opacity", "Opacity", "mean of the step's picture: how much of it the object covers"),
)
Point = tuple[float, float]


def curves(rows: Sequence[dict[str, Any]], n_steps: int) -> str:
    """Return the curves of a history as HTML; one that has no number is left out."""
    drawn = [figure(curve, points, n_steps) for curve in CURVES if (points := points_of(rows, curve, n_steps))]
    return f'<div class="curves">\n{"".join(drawn)}</div>\n' if drawn else "<p>No step is logged yet.</p>\n"


def points_of(rows: Sequence[dict[str, Any]], curve: Curve, n_steps: int) -> list[Point]:
    """Return the points (step, value) of a statistic that are numbers on a scale of this world.

    On a logarithmic axis they are above 0. Of more than MOST points, neighbours are averaged.
    """
    found = [(whole(row["step"]), real(row.get(curve.key))) for row in rows]
    points = [
        (float(step), value)
        for step, value in found
        if step <= n_steps and value is not None and abs(value) < HUGE and (value > 1 / HUGE or not curve.log)
    ]
    size = math.ceil(len(points) / MOST) or 1
    return [mean(points[i : i + size]) for i in range(0, len(points), size)]


def mean(points: Sequence[Point]) -> Point:
    """Return the centre of some points."""
    return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)


def smoothed(points: Sequence[Point], log: bool) -> list[Point]:
    """Return the points, each value the mean of its neighbours, of logarithms where the axis is logarithmic."""
    reach = round(len(points) * SMOOTH / 2)
    values = [math.log(value) if log else value for _, value in points]
    found = []
    for i, (step, _) in enumerate(points):
        near = values[max(0, i - reach) : i + reach + 1]
        average = sum(near) / len(near)
        found.append((step, math.exp(average) if log else average))
    return found


def figure(curve: Curve, points: Sequence[Point], n_steps: int) -> str:
    """Return a statistic over the steps of a run: its points, and a smooth line through them."""
    values = [value for _, value in points]
    low, high = limits(min(values), max(values), curve.log)
    across, up = place(0, n_steps, LEFT, W - RIGHT, False), place(low, high, H - BOTTOM, TOP, curve.log)

    def path(line: Sequence[Point]) -> str:
        return "M" + "L".join(f"{across(step):.1f} {up(value):.1f}" for step, value in line)

    spoken = (
        f"{curve.title}, {curve.meaning}. {number(values[0])} at first, {number(values[-1])} at last, between "
        f"{number(min(values))} and {number(max(values))}."
    )
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{W - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks(low, high, curve.log)
    )
    steps = "".join(
        f'<path class="grid" d="M{across(tick):.1f} {H - BOTTOM}v4"/>'
        f'<text x="{across(tick):.1f}" y="{H - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks(0, n_steps, False)
    )
    return (
        f"<figure><figcaption><b>{escape(curve.title)}</b> <span>{escape(curve.meaning)}</span></figcaption>\n"
        f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(spoken)}">{grid}{steps}'
        f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 4}" text-anchor="middle">step</text>'
        f'<path class="axis" d="M{LEFT} {TOP}V{H - BOTTOM}H{W - RIGHT}"/>'
        f'<path class="raw" d="{path(points)}"/><path class="line" d="{path(smoothed(points, curve.log))}"/>'
        "</svg></figure>\n"
    )


# ---------------------------------------------------------------- axes


def limits(low: float, high: float, log: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds values from `low` to `high`: ticks, on a linear one."""
    if log:
        low, high = low / 1.05, high * 1.05
        return (low, high) if high / low > 1.5 else (low / 1.5, high * 1.5)
    if high == low:
        low, high = low - max(abs(low), 1e-3) / 2, high + max(abs(high), 1e-3) / 2
    for _ in range(2):  # a longer axis may have other ticks
        step = tick_step(low, high)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def tick_step(low: float, high: float) -> float:
    """Return the distance of ticks: 1, 2 or 5 times a power of ten, such that there are some five."""
    rough = (high - low) / 4
    power = DECADE ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Return the values that an axis names."""
    if not log:
        step = tick_step(low, high)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * DECADE**decade for decade in decades for factor in factors]
        inside = [tick for tick in found if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 6)]
    return inside or [low, high]


def place(low: float, high: float, start: float, end: float, log: bool) -> Any:
    """Return the function from a value to its place on an axis from `start` to `end`."""
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    return lambda value: start + (end - start) * ((math.log(value) if log else value) - a) / (b - a)
