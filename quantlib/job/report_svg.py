"""The plots of the HTML report, as inline SVG text.

Written by hand because a report must open years later, without a network and without a plotting library.
Colors come from the page's style sheet through classes, so that light and dark both work; every mark carries
its value as a ``<title>``, which browsers show as a tooltip and screen readers read.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from quantlib.job.report_figures import is_number, largest, number

# Units of the view box; drawn at 0.8 to 1.4 times that size, which keeps 12-unit text readable on a phone.
_WIDTH = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_ROW = 22
_MAX_LABELS = 12


def line_chart(values: Sequence[float | None], names: Sequence[str], *, x_label: str, y_label: str) -> str:
    """One value a block over depth, from zero up; a value that is None leaves a gap."""
    height, inner = 220, 220 - _TOP - _BOTTOM
    top = nice_top(largest(values) or 0.0)
    xs = _positions(len(values), _LEFT + 8, _WIDTH - _RIGHT - 8)
    points = [
        None if value is None else (x, _TOP + inner * (1 - value / top))
        for x, value in zip(xs, values, strict=True)
    ]
    marks = [_y_axis(top, inner), _x_labels(xs, names, height - _BOTTOM + 16)]
    marks += [f'<polyline class="line" points="{_joined(run)}"/>' for run in _runs(points)]
    for point, name, value in zip(points, names, values, strict=True):
        if point is not None:
            marks.append(
                f'<circle class="mark" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3">'
                f"<title>{escape(x_label)} {escape(name)}: {number(value)}</title></circle>"
            )
    marks.append(_axis_title(x_label, height))
    return _svg(height, f"{y_label} over {x_label}", marks)


def heat_map(rows: Mapping[str, Sequence[float | None]], names: Sequence[str], *, x_label: str) -> str:
    """One row a kind, one column a block; the stronger the larger, an outline where there is no value."""
    left = _LEFT + 6 * max((len(kind) for kind in rows), default=0) - 20
    step = min((_WIDTH - _RIGHT - left) / max(len(names), 1), 2 * _ROW)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    top = max((largest(values) or 0.0 for values in rows.values()), default=0.0)
    marks = []
    for position, (kind, values) in enumerate(rows.items()):
        y = _TOP + _ROW * position
        marks.append(f'<text class="tick end" x="{left - 6:.1f}" y="{y + 15}">{escape(kind)}</text>')
        marks += [
            _cell(left + step * column, y, step, value, top, f"{kind}, {x_label} {name}")
            for column, (name, value) in enumerate(zip(names, values, strict=True))
        ]
    centers = [left + step * (column + 0.5) for column in range(len(names))]
    marks.append(_x_labels(centers, names, height - _BOTTOM + 16))
    marks.append(_axis_title(x_label, height))
    return _svg(height, f"a value for each kind of linear and {x_label}", marks)


def bar(value: float, top: float) -> str:
    """A horizontal bar that fills ``value / top`` of the width it is given."""
    share = 100 * value / top if top > 0 else 0.0
    return (
        f'<svg class="bar" aria-hidden="true"><rect class="fill" height="100%" width="{share:.1f}%"/></svg>'
    )


def nice_top(value: float) -> float:
    """The end of an axis from zero that holds a value: 1, 1.5, 2, 3, 4, 5, 6, 8 or 10 times a power of ten.

    >>> nice_top(0.0871), nice_top(2.2), nice_top(0)
    (0.1, 3.0, 1.0)
    """
    if not is_number(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    # Two roundings away a value may exceed its own bound by an ulp.
    fitting = (step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-12))
    return float(f"{next(fitting, 10) * power:.12g}")


def _cell(x: float, y: float, step: float, value: float | None, top: float, name: str) -> str:
    place = f'x="{x:.2f}" y="{y}" width="{max(step - 0.6, 0.6):.2f}" height="{_ROW - 2}"'
    if value is None:
        return f'<rect class="empty" {place}><title>{escape(name)}: no value</title></rect>'
    strength = 0.06 + 0.94 * value / top if top > 0 else 0.06
    title = f"<title>{escape(name)}: {number(value)}</title>"
    return f'<rect class="fill" fill-opacity="{strength:.3f}" {place}>{title}</rect>'


def _positions(num_values: int, start: float, end: float) -> list[float]:
    if num_values == 1:
        return [(start + end) / 2]
    return [start + (end - start) * i / (num_values - 1) for i in range(num_values)]


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Stretches of neighbouring points that a line can join."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is not None:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _y_axis(top: float, inner: float) -> str:
    marks = []
    for share in (0.0, 0.5, 1.0):
        y = _TOP + inner * (1 - share)
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{number(top * share)}</text>')
    return "".join(marks)


def _x_labels(xs: Sequence[float], names: Sequence[str], y: float) -> str:
    every = max(1, math.ceil(len(names) / _MAX_LABELS))
    shown = list(zip(xs, names, strict=True))[::every]
    return "".join(f'<text class="tick mid" x="{x:.1f}" y="{y}">{escape(name)}</text>' for x, name in shown)


def _axis_title(text: str, height: float) -> str:
    return f'<text class="tick end" x="{_WIDTH - _RIGHT}" y="{height - 3}">{escape(text)}</text>'


def _svg(height: float, label: str, marks: Sequence[str]) -> str:
    start = f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return start + "".join(marks) + "</svg>"
