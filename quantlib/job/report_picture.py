"""The error of each block as an SVG file of its own, for whoever shows pictures and not the HTML report."""

from collections.abc import Mapping
from html import escape
from typing import Any

from quantlib.job.report_figures import is_number, model_name, request
from quantlib.job.report_svg import line_chart

_WIDTH, _HEIGHT, _TITLE = 560, 220, 30
# Page, text, grid and line on a light and on a dark page.
_LIGHT, _DARK = ("#ffffff", "#1f2733", "#dfe4ea", "#2457d6"), ("#14171b", "#e6e9ed", "#333a43", "#86a9ff")


def error_picture(report: Mapping[str, Any]) -> str | None:
    """Relative error of the quantized stream behind each block; None where none was measured.

    Blocks are counted from 1, as in the names of stages.
    """
    blocks = report.get("blocks") or ()
    values = [block.get("relative_error") for block in blocks]
    if not any(is_number(value) for value in values):
        return None
    chart = line_chart(
        [value if is_number(value) else None for value in values],
        [str(block["index"] + 1) for block in blocks],
        x_label="block",
        y_label="relative error",
    )
    # A plot fills what it is given; nested, that is its own view box.
    chart = chart.replace('<svg class="plot"', f'<svg width="{_WIDTH}" height="{_HEIGHT}"', 1)
    size = f'width="{_WIDTH}" height="{_HEIGHT + _TITLE}"'
    page = f'viewBox="0 {-_TITLE} {_WIDTH} {_HEIGHT + _TITLE}" {size}'
    title = f"{model_name(report)}, {request(report)}: relative error behind each block"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {page}>\n<style>{_style()}</style>\n'
        f'<rect class="page" y="{-_TITLE}" {size}/>\n<text x="8" y="-10">{escape(title)}</text>\n'
        f"{chart}\n</svg>\n"
    )


def _style() -> str:
    fixed = (
        "text{font:12px system-ui,sans-serif}.end{text-anchor:end}.mid{text-anchor:middle}"
        ".line{fill:none;stroke-width:2;stroke-linejoin:round}"
    )
    light, dark = (
        f".page{{fill:{page}}}text{{fill:{ink}}}.grid{{stroke:{grid}}}.line{{stroke:{line}}}.mark{{fill:{line}}}"
        for page, ink, grid, line in (_LIGHT, _DARK)
    )
    return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"
