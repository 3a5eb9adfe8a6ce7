"""Who waited for whom: the lanes of the workers over the time of a run, as inline SVG text.

Two rows a worker, one for computation and one for storage, colored by stage; waiting is what stays empty.
Colors are classes that the page's style sheet fills, light and dark; every mark tells its stage, start and
length as a ``<title>``.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quantlib.job.report_figures import LANES, duration, number

# Stage -> its color on a light and on a dark page, the same in every report.
_COLORS = {
    "solve": ("#2457d6", "#6f98ff"),
    "capture": ("#1a9a78", "#3cc9a0"),
    "evaluate": ("#e08a00", "#ffb347"),
    "forward": ("#8fc31f", "#b7e35c"),
    "load": ("#8a5cd6", "#b794ff"),
    "embed": ("#d6457f", "#ff86b3"),
    "head": ("#8f5d32", "#c99a6b"),
    "checkpoint": ("#6b7280", "#98a2b0"),
    "plan": ("#a9b4c2", "#667182"),
    "stage": ("#3c4653", "#d3d9e0"),
    "read": ("#29a7d8", "#56c8f2"),
    "write": ("#c4402f", "#f0806f"),
    "check": ("#a89a17", "#d8ca4a"),
}
_OTHER_STAGE = ("#c2a5a0", "#7d6a67")
_PAIRS = (*_COLORS.values(), _OTHER_STAGE)
_PLACES = {stage: place for place, stage in enumerate(_COLORS)}
MAX_WORKERS = 16

# Units of the view box; as wide as the page, which keeps text at its size.
_WIDTH, _LEFT, _RIGHT = 1120, 128, 12
_LANE, _BETWEEN_LANES, _BETWEEN_WORKERS = 14, 2, 8
_BOTTOM = 24
# Anything narrower would not be seen.
_NARROWEST = 0.8
_MOST_TICKS = 9
_TICK_STEPS_S = tuple(
    step * unit
    for unit, steps in (
        (0.001, (1, 2, 5, 10, 20, 50, 100, 200, 500)),
        (1, (1, 2, 5, 10, 20, 30)),
        (60, (1, 2, 5, 10, 20, 30)),
        (3600, (1, 2, 3, 6, 12, 24, 48, 120, 240)),
    )
    for step in steps
)


def style() -> str:
    """The rules that fill the marks and the keys of the legend."""
    light, dark = (
        "".join(f".s{i}{{fill:{pair[theme]};background:{pair[theme]}}}\n" for i, pair in enumerate(_PAIRS))
        for theme in (0, 1)
    )
    return f"{light}@media (prefers-color-scheme:dark){{\n{dark}}}\n"


def timeline(workers: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """The picture of ``timeline.workers`` of a report, from the run's start to its end.

    Of more than `MAX_WORKERS` workers those of `shown_workers` are drawn.
    """
    shown = shown_workers(workers)
    height_of_worker = 2 * _LANE + _BETWEEN_LANES + _BETWEEN_WORKERS
    bottom = height_of_worker * len(shown)
    marks = [_time_axis(seconds, bottom)]
    for row, number_of_worker in enumerate(shown):
        y = height_of_worker * row + _BETWEEN_WORKERS / 2
        marks.append(f'<text class="tick" x="0" y="{y + 11:g}">worker {number_of_worker}</text>')
        for position, lane in enumerate(LANES):
            place = y + position * (_LANE + _BETWEEN_LANES)
            marks += _lane(workers[number_of_worker], lane, place, seconds)
    label = "what each worker computed and moved over the time of the run"
    return (
        f'<svg class="plot timeline" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" role="img"'
        f' aria-label="{label}">{"".join(marks)}</svg>'
    )


def legend(workers: Sequence[Mapping[str, Any]]) -> str:
    """The colors of the stages that the picture of these workers has, lane by lane."""
    shown = [workers[number_of_worker] for number_of_worker in shown_workers(workers)]
    parts = []
    for lane in LANES:
        found = {stage for worker in shown for stage, _, end in worker[lane] if end > 0}
        stages = sorted(found, key=lambda stage: (_color(stage), stage))
        keys = "".join(f'<span><i class="key s{_color(x)}"></i>{escape(x)}</span>' for x in stages)
        parts.append(f"<p>{lane}: {keys}</p>" if keys else "")
    return f'<div class="legend">{"".join(parts)}</div>'


def shown_workers(workers: Sequence[Mapping[str, Any]], limit: int = MAX_WORKERS) -> list[int]:
    """Numbers of the workers to draw: all, or evenly chosen from the busiest to the least busy.

    The busiest is the one that others waited for, the least busy the one that waited most: both are there.
    """
    if len(workers) <= limit:
        return list(range(len(workers)))
    by_work = sorted(range(len(workers)), key=lambda worker: -_busy_seconds(workers[worker]))
    return sorted(by_work[round(i * (len(workers) - 1) / (limit - 1))] for i in range(limit))


def _busy_seconds(worker: Mapping[str, Any]) -> float:
    return sum(end - start for _, start, end in worker["compute"])


def _lane(worker: Mapping[str, Any], lane: str, y: float, seconds: float) -> list[str]:
    """The row of a lane: a track from where the worker is there, and on it what was done."""
    since = min(max(0.0, worker["began"]), seconds)
    x, width = _x(since, seconds), _x(seconds, seconds) - _x(since, seconds)
    marks = [
        f'<text class="tick end" x="{_LEFT - 8}" y="{y + 11:g}">{escape(lane)}</text>',
        f'<rect class="track" x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{_LANE}"/>',
    ]
    for stage, start, end in worker[lane]:
        if end <= 0 or start >= seconds:
            continue
        left, right = _x(max(start, 0.0), seconds), _x(min(end, seconds), seconds)
        title = f"{stage}: from {_said(start)}, for {_said(end - start)}"
        marks.append(
            f'<rect class="s{_color(stage)}" x="{left:.1f}" y="{y:g}"'
            f' width="{max(right - left, _NARROWEST):.1f}" height="{_LANE}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return marks


def _time_axis(seconds: float, bottom: float) -> str:
    step = next((step for step in _TICK_STEPS_S if seconds / step <= _MOST_TICKS), _TICK_STEPS_S[-1])
    marks = []
    for tick in range(int(seconds / step) + 1):
        x = _x(tick * step, seconds)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom + 4:g}"/>')
        # A label in the middle of the last line would stand out of the picture.
        kind = "mid" if x < _WIDTH - 3 * _RIGHT else "end"
        text = _tick_label(tick * step, step)
        marks.append(f'<text class="tick {kind}" x="{x:.1f}" y="{bottom + 18:g}">{text}</text>')
    return "".join(marks)


def _tick_label(tick_s: float, step_s: float) -> str:
    if tick_s == 0:
        return "0"
    unit, name = next(pair for pair in ((3600, "h"), (60, "min"), (0, "s")) if step_s >= pair[0])
    return f"{tick_s / (unit or 1):.6g} {name}"


def _x(at_s: float, seconds: float) -> float:
    return _LEFT + (_WIDTH - _RIGHT - _LEFT) * at_s / seconds


def _color(stage: str) -> int:
    return _PLACES.get(stage, len(_PLACES))


def _said(seconds: float) -> str:
    return f"{number(seconds, 3)} s" if seconds < 60 else duration(seconds)
