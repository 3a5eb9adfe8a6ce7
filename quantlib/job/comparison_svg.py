"""The picture of a comparison: KL divergence over bits a weight, as an SVG file of its own.

KL divergence and not perplexity, because it is above zero wherever codes change the model, so that 2 and 8
bits fit on one logarithmic axis; the label of a mark tells the ratio of the perplexities. Written by hand as
the plots of the report are; colors follow the reader's theme.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from quantlib.job.label_places import Box, place_labels
from quantlib.job.report_figures import is_number, model_name, number

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 66, 64
# Method -> its color on a light and on a dark page.
_COLORS = {"gptq": ("#2457d6", "#6f98ff"), "rtn": ("#c2600a", "#ffb347")}
_LIGHT, _DARK = ("#ffffff", "#1f2733", "#dfe4ea"), ("#0d1117", "#e4e9ef", "#2d3540")
# Of a decade: all of them where there are few decades.
_STEPS = (1, 2, 5)
_FEW_DECADES = 2.5
# Of the axes beyond the outermost marks: bits, and a factor.
_MARGIN_BITS, _MARGIN_FACTOR = 0.5, 1.8


def comparison_picture(comparison: Mapping[str, Any]) -> str:
    """The rows of a comparison as an SVG file; those without a figure above zero are named below it."""
    rows = [row for row in comparison["rows"] if _is_drawn(row)]
    left_out = [row["entry"] for row in comparison["rows"] if not _is_drawn(row)]
    marks = list(_drawn(rows)) if rows else []
    if left_out:
        marks.append(_text("tick", _LEFT, _HEIGHT - 8, f"Not drawn, without a figure: {', '.join(left_out)}"))
    title = f"{model_name(comparison)}: KL divergence over bits a weight (labels: ratio of perplexities)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
        f' height="{_HEIGHT}" role="img" aria-label="{escape(title)}">\n<style>{_style()}</style>\n'
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>\n'
        + "\n".join([_text("title", _LEFT, 24, title), *marks])
        + "\n</svg>\n"
    )


def _is_drawn(row: Mapping[str, Any]) -> bool:
    return is_number(row["bits_per_weight"]) and is_number(row["kl_divergence"]) and row["kl_divergence"] > 0


class _Scale:
    """Where bits and divergences are on the picture."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        bits = [row["bits_per_weight"] for row in rows]
        values = [row["kl_divergence"] for row in rows]
        self.bits = (min(bits) - _MARGIN_BITS, max(bits) + _MARGIN_BITS)
        self.values = (min(values) / _MARGIN_FACTOR, max(values) * _MARGIN_FACTOR)

    def x(self, bits: float) -> float:
        low, high = self.bits
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (bits - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = (math.log(end) for end in self.values)
        share = (math.log(value) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def bit_ticks(self) -> range:
        low, high = self.bits
        return range(math.ceil(low), math.floor(high) + 1)

    def value_ticks(self) -> Iterator[float]:
        low, high = self.values
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = _STEPS if math.log10(high / low) < _FEW_DECADES else _STEPS[:1]
        for decade in range(first, last + 1):
            yield from (step * 10.0**decade for step in steps if low <= step * 10.0**decade <= high)


def _drawn(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    scale = _Scale(rows)
    yield from _axes(scale)
    yield from _legend(rows)
    points = [(scale.x(row["bits_per_weight"]), scale.y(row["kl_divergence"])) for row in rows]
    labels = [_label(row) for row in rows]
    frame = Box(left=_LEFT, top=_TOP, right=_WIDTH - 4, bottom=_HEIGHT - _BOTTOM)
    places = place_labels(points, labels, frame)
    for row, (x, y), label, place in zip(rows, points, labels, places, strict=True):
        title = (
            f"{row['entry']}: {number(row['bits_per_weight'])} bits a weight, KL divergence"
            f" {number(row['kl_divergence'])}, perplexity x {number(row['ratio'], 5)}"
        )
        yield _mark(row["method"], x, y, title)
        # How wide the text gets depends on the reader's font: it grows away from its mark.
        is_left = place.left < x
        kind = f"m-{row['method']}{' end' if is_left else ''}"
        yield _text(kind, place.right if is_left else place.left, place.bottom - 3, label)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['scheme']}@{row['group_size']} x {number(row['ratio'], 5)}"


def _axes(scale: _Scale) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in scale.value_ticks():
        y = scale.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text("tick end", _LEFT - 8, y + 4, number(value))
    for bits in scale.bit_ticks():
        x = scale.x(bits)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield _text("tick mid", x, bottom + 18, str(bits))
    yield _text("tick end", right, bottom + 36, "bits a weight, with scales")


def _legend(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for place, method in enumerate(sorted({row["method"] for row in rows})):
        x = _LEFT + 6 + 80 * place
        yield _mark(method, x, 46, method)
        yield _text(f"m-{method}", x + 10, 50, method)


def _mark(method: str, x: float, y: float, title: str) -> str:
    """A circle for gptq, a square for what rounds."""
    shape = f'circle cx="{x:.1f}" cy="{y:.1f}" r="5"'
    if method == "rtn":
        shape = f'rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"'
    name = shape.partition(" ")[0]
    return f'<{shape} class="m-{method}"><title>{escape(title)}</title></{name}>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _style() -> str:
    fixed = (
        "text{font:12px system-ui,Segoe UI,Helvetica,Arial,sans-serif}"
        ".title{font-size:14px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}"
    )
    light, dark = (
        f".page{{fill:{page}}}text{{fill:{ink}}}.grid{{stroke:{grid}}}"
        + "".join(f".m-{method}{{fill:{pair[theme]}}}" for method, pair in _COLORS.items())
        for theme, (page, ink, grid) in enumerate((_LIGHT, _DARK))
    )
    return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"
