"""``python -m quantlib.simulation.scaling_picture OUTPUT.svg``: time over GPUs of the shipped models.

Both axes are logarithmic, so that a job which is twice as fast on twice the GPUs is a straight line; it is
drawn dashed from one GPU. Written by hand as the plots of the report are; colors follow the reader's theme.
With ``--table`` the same runs as rows for a README.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlib.job.report_figures import duration, number
from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config, shipped_config
from quantlib.simulation.costs import Workload
from quantlib.simulation.hardware import DEFAULT_NETWORK, DEFAULT_STORAGE, parse_cluster
from quantlib.simulation.prediction import WORDS, predict

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IN_TABLE = (8, 64, 256)
_KIND = "H100"
WORKLOAD = Workload(sequences=512)
MODELS = ("llama-3.1-70b", "llama-3.1-405b", "deepseek-v3")
_SCHEME = scheme_from_name("W4A16", 128)

_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 46, 92
# Model -> its color on a light and on a dark page.
_COLORS = (("#2457d6", "#6f98ff"), ("#c2600a", "#ffb347"), ("#157f62", "#3cc9a0"))
_LIGHT, _DARK = ("#ffffff", "#1f2733", "#dfe4ea"), ("#0d1117", "#e4e9ef", "#2d3540")
_TICKS_S = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)


def scaling_runs(workload: Workload = WORKLOAD) -> dict[str, list[dict[str, Any]]]:
    """Model -> its predictions on every number of GPUs."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        shape = shape_of_config(name, shipped_config(name), _SCHEME)
        clusters = [
            parse_cluster(f"{gpus}x{_KIND}", network=DEFAULT_NETWORK, storage=DEFAULT_STORAGE)
            for gpus in GPUS
        ]
        runs[name] = [predict(shape, workload, cluster) for cluster in clusters]
    return runs


def scaling_picture(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The runs as an SVG file."""
    seconds = [found["seconds"] for row in runs.values() for found in row]
    scale = _Scale(min(seconds), max(seconds))
    marks = [_frame(scale)]
    labels = _label_places({name: scale.y(row[-1]["seconds"]) for name, row in runs.items()})
    for place, (name, row) in enumerate(runs.items()):
        marks += _curve(place, name, row, scale, labels[name])
    title = f"Predicted time of a conversion by GPUs ({_KIND}, nodes of 8), {_sequences()}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
        f' height="{_HEIGHT}" role="img" aria-label="{title}">\n<style>{_style()}</style>\n'
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>\n'
        f'<text class="title" x="{_LEFT}" y="24">{title}</text>\n' + "\n".join(marks) + "\n</svg>\n"
    )


def scaling_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Time, GPU-hours and bottleneck on some of the clusters, as a Markdown table."""
    head = "".join(f" {gpus} GPUs |" for gpus in IN_TABLE)
    lines = [f"| model |{head}", "|---|" + "---|" * len(IN_TABLE)]
    for name, row in runs.items():
        cells = " | ".join(_said(found) for found in row if found["gpus"] in IN_TABLE)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


def _said(found: Mapping[str, Any]) -> str:
    hours = number(found["gpu_hours"], 3)
    return f"{duration(found['seconds'])}, {hours} GPU-h, {WORDS[found['bottleneck']]}"


class _Scale:
    """Where numbers of GPUs and seconds are on the picture."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._low, self._high = math.log(least_s / 1.6), math.log(most_s * 1.4)

    def x(self, gpus: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(gpus) / math.log(GPUS[-1])

    def y(self, seconds: float) -> float:
        share = (math.log(seconds) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def holds(self, seconds: float) -> bool:
        return self._low <= math.log(seconds) <= self._high

    def ideal_end(self, seconds: float) -> float:
        """GPUs at which the straight line from one GPU leaves the picture."""
        return min(float(GPUS[-1]), seconds / math.exp(self._low))


def _frame(scale: _Scale) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    marks = []
    for tick in filter(scale.holds, _TICKS_S):
        y = scale.y(tick)
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{tick // 60} min" if tick < 3600 else f"{tick // 3600} h"
        marks.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
    for gpus in GPUS:
        x = scale.x(gpus)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        marks.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 18}">{gpus}</text>')
    notes = (
        "GPUs; dashed: twice as fast on twice as many; hollow: needs more memory than a GPU has",
        f"Simulated, not measured: a node has {DEFAULT_NETWORK} of network and {DEFAULT_STORAGE} of storage,",
        f"a GPU does {_rates()}.",
    )
    marks += [
        f'<text class="tick" x="{_LEFT}" y="{bottom + 40 + 18 * line}">{note}</text>'
        for line, note in enumerate(notes)
    ]
    return "\n".join(marks)


def _curve(
    place: int, name: str, row: Sequence[Mapping[str, Any]], scale: _Scale, label_y: float
) -> list[str]:
    first = row[0]["seconds"]
    end = scale.ideal_end(first)
    points = [(scale.x(found["gpus"]), scale.y(found["seconds"])) for found in row]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [
        f'<line class="ideal c{place}" x1="{scale.x(1):.1f}" y1="{scale.y(first):.1f}"'
        f' x2="{scale.x(end):.1f}" y2="{scale.y(first / end):.1f}"/>',
        f'<polyline class="line c{place}" points="{joined}"/>',
    ]
    for (x, y), found in zip(points, row, strict=True):
        said = f"{name}, {found['gpus']} GPUs: {_said(found)}"
        fits = found["gpu_memory_bytes"]["total"] <= found["gpu_memory_size_bytes"]
        kind = "mark" if fits else "hollow"
        marks.append(
            f'<circle class="{kind} c{place}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{said}</title></circle>'
        )
    label = f'<text class="name n{place}" x="{_WIDTH - _RIGHT + 12}" y="{label_y + 4:.1f}">{name}</text>'
    return [*marks, label]


def _label_places(wanted: Mapping[str, float], apart: float = 18.0) -> dict[str, float]:
    """Heights of labels, moved down where they would touch."""
    places: dict[str, float] = {}
    lowest = -math.inf
    for name, y in sorted(wanted.items(), key=lambda found: found[1]):
        lowest = places[name] = max(y, lowest + apart)
    return places


def _sequences() -> str:
    return f"{WORKLOAD.sequences} x {WORKLOAD.sequence_length} tokens"


def _rates() -> str:
    cluster = parse_cluster(_KIND, network=DEFAULT_NETWORK, storage=DEFAULT_STORAGE)
    rates = cluster.rates
    return (
        f"{rates.matrix_flops / 1e12:.0f} TFLOP/s in bf16, {rates.factor_flops / 1e12:.0f} in factors,"
        f" {rates.solve_flops / 1e12:.0f} in solves"
    )


def _style() -> str:
    fixed = (
        "text{font-family:system-ui,Segoe UI,Helvetica,Arial,sans-serif}"
        ".title{font-size:15px;font-weight:600}.name{font-size:13px;font-weight:600}"
        ".tick{font-size:12px}.end{text-anchor:end}.mid{text-anchor:middle}"
        ".line{fill:none;stroke-width:2.2}.ideal{stroke-width:1.3;stroke-dasharray:4 4;opacity:.75}"
        ".hollow{stroke-width:1.8}"
    )
    light, dark = (
        f".page,.hollow{{fill:{page}}}text{{fill:{ink}}}.grid{{stroke:{grid}}}"
        + "".join(
            f".c{i}{{stroke:{pair[theme]}}}.mark.c{i},.n{i}{{fill:{pair[theme]}}}"
            for i, pair in enumerate(_COLORS)
        )
        for theme, (page, ink, grid) in enumerate((_LIGHT, _DARK))
    )
    return f"{fixed}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture, or print the table."""
    parser = argparse.ArgumentParser(description="Predicted time over GPUs of the shipped models.")
    parser.add_argument("output", nargs="?", type=Path, help="SVG file to write.")
    parser.add_argument("--table", action="store_true", help="Print the table of the README.")
    parsed = parser.parse_args(arguments)
    if parsed.output is None and not parsed.table:
        parser.error("name a file to write, or --table")
    runs = scaling_runs(WORKLOAD)
    if parsed.output is not None:
        parsed.output.write_text(scaling_picture(runs), encoding="utf-8")
    if parsed.table:
        sys.stdout.write(scaling_table(runs) + "\n")


if __name__ == "__main__":
    main()
