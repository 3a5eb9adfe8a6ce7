"""The timeline: what a job records of itself, and the picture of it."""

import json
import re
from html.parser import HTMLParser

import pytest

from quantlib.inprocess import quantize
from quantlib.job.report_html import render_html
from quantlib.job.report_text import format_report
from quantlib.job.report_timeline import MAX_WORKERS, legend, shown_workers, style, timeline
from tests.support.report_example import example_report
from tests.support.tiny_jobs import tiny_options

HEADING = "Who waited for whom"


class Drawing(HTMLParser):
    """The rectangles of an SVG, each with its title, and its other texts."""

    def __init__(self, svg: str) -> None:
        super().__init__()
        self.rects: list[dict[str, str]] = []
        self.texts: list[str] = []
        self._in_title = False
        self.feed(svg)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "rect":
            self.rects.append({**dict(attrs), "title": ""})
        self._in_title = tag == "title"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        if self._in_title:
            self.rects[-1]["title"] = data
        else:
            self.texts.append(data)

    def handle_endtag(self, tag):
        self._in_title = False

    @property
    def marks(self) -> list[dict[str, str]]:
        return [rect for rect in self.rects if rect["class"] != "track"]

    @property
    def tracks(self) -> list[dict[str, str]]:
        return [rect for rect in self.rects if rect["class"] == "track"]


def worker(compute=(), storage=(), began=0.0):
    return {"began": began, "compute": list(compute), "storage": list(storage)}


def span(rect) -> tuple[float, float]:
    return float(rect["x"]), float(rect["x"]) + float(rect["width"])


def test_job_records_when_its_lanes_did_what(tmp_path):
    report = quantize(tiny_options(tmp_path))
    (one,) = report["timeline"]["workers"]
    compute, storage = one["compute"], one["storage"]
    for lane in (compute, storage):
        starts = [start for _, start, _ in lane]
        assert starts == sorted(starts)
        assert all(start <= end for _, start, end in lane)
    assert {stage for stage, _, _ in storage} == {"read", "write"}
    assert {"capture", "solve", "evaluate", "head"} <= {stage for stage, _, _ in compute}
    assert compute[0][0] == "plan" and one["began"] <= compute[0][1] < 0 < compute[-1][2]
    assert compute[-1][2] <= report["seconds"] + 60
    for stage, spent in report["stages"].items():
        lengths = [end - start for found, start, end in [*compute, *storage] if found == stage]
        # Rounded to milliseconds, and with the gaps between calls that follow each other within 20 ms.
        assert sum(lengths) >= spent["seconds"] - 0.001 * len(lengths) - 1e-6
        assert sum(lengths) <= spent["seconds"] + 0.001 * len(lengths) + 0.02 * spent["calls"]
    assert 0 < report["timeline"]["busy_share"] <= 1
    assert 0 <= report["timeline"]["hidden_storage_share"] <= 1
    stored = json.loads((tmp_path / "output" / "quantmill_report.json").read_text())
    assert stored["timeline"] == report["timeline"]
    assert HEADING in (tmp_path / "output" / "quantmill_report.html").read_text()


def test_marks_stand_where_their_time_is():
    drawing = Drawing(
        timeline([worker([("solve", 0, 25), ("capture", 50, 100)], [("read", 25, 50)])], seconds=100)
    )
    solve, capture, read = drawing.marks
    (left, right), track = span(drawing.tracks[0]), drawing.tracks[1]
    quarter = (right - left) / 4
    assert span(solve) == pytest.approx((left, left + quarter), abs=0.2)
    assert span(capture) == pytest.approx((left + 2 * quarter, right), abs=0.2)
    assert span(read) == pytest.approx((left + quarter, left + 2 * quarter), abs=0.2)
    assert solve["y"] == capture["y"] != read["y"] == track["y"]
    assert len({mark["class"] for mark in drawing.marks}) == 3
    titles = [mark["title"] for mark in drawing.marks]
    assert titles == [
        "solve: from 0 s, for 25 s",
        "capture: from 50 s, for 50 s",
        "read: from 25 s, for 25 s",
    ]


def test_picture_ends_where_the_run_began_and_ended():
    entries = [("plan", -9, -2), ("capture", -1, 5), ("solve", 8, 14), ("head", 11, 12)]
    drawing = Drawing(timeline([worker(entries, began=-10)], seconds=10))
    (left, right), (capture, solve) = span(drawing.tracks[0]), drawing.marks
    assert span(capture) == pytest.approx((left, (left + right) / 2), abs=0.2)
    assert span(solve)[1] == pytest.approx(right, abs=0.2)


def test_worker_that_came_later_has_no_track_before():
    drawing = Drawing(timeline([worker(), worker(began=5.0)], seconds=10))
    starts = [span(track)[0] for track in drawing.tracks]
    width = span(drawing.tracks[0])[1] - starts[0]
    assert starts[0] == starts[1]
    assert starts[2] == starts[3] == pytest.approx(starts[0] + width / 2, abs=0.2)


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (0.64, ["0", "0.1 s", "0.2 s", "0.3 s", "0.4 s", "0.5 s", "0.6 s"]),
        (8, ["0", *(f"{i} s" for i in range(1, 9))]),
        (252.3, ["0", *(f"{i * 30} s" for i in range(1, 9))]),
        (2000, ["0", "5 min", "10 min", "15 min", "20 min", "25 min", "30 min"]),
        (20000, ["0", "1 h", "2 h", "3 h", "4 h", "5 h"]),
        (86400 * 365, ["0", *(f"{i * 240} h" for i in range(1, 37))]),
    ],
)
def test_time_axis_has_few_round_labels(seconds, labels):
    texts = Drawing(timeline([worker()], seconds)).texts
    assert [text for text in texts if text[0].isdigit()] == labels


def test_legend_names_the_stages_of_each_lane_with_the_color_of_their_marks():
    entries = [("plan", -5, -1), ("solve", 1, 2), ("strange", 3, 4), ("load", 0, 1)]
    workers = [worker(entries, [("write", 1, 3)])]
    keys = re.findall(r'<i class="key (s\d+)"></i>([^<]+)', legend(workers))
    assert [name for _, name in keys] == ["solve", "load", "strange", "write"]
    marks = {mark["title"].split(":")[0]: mark["class"] for mark in Drawing(timeline(workers, 10)).marks}
    assert marks == {name: color for color, name in keys}


def test_every_color_is_there_for_light_and_dark_pages():
    light, dark = style().split("@media (prefers-color-scheme:dark)")
    rule = r"\.(s\d+)\{fill:(#[0-9a-f]{6});background:(#[0-9a-f]{6})\}"
    light_rules, dark_rules = re.findall(rule, light), re.findall(rule, dark)
    assert [name for name, _, _ in light_rules] == [name for name, _, _ in dark_rules]
    for rules in (light_rules, dark_rules):
        assert len({fill for _, fill, _ in rules}) == len(rules)
        assert all(fill == background for _, fill, background in rules)
    assert light.count("{") == light.count("}") == len(light_rules)


def test_few_workers_are_all_shown():
    assert shown_workers([worker()] * MAX_WORKERS) == list(range(MAX_WORKERS))


def test_of_many_workers_the_busiest_and_the_idlest_are_shown():
    seconds = [(7 * i) % 40 + 1 for i in range(40)]
    workers = [worker([("solve", 0, length)]) for length in seconds]
    shown = shown_workers(workers)
    assert len(set(shown)) == MAX_WORKERS and shown == sorted(shown)
    assert {seconds.index(1), seconds.index(40)} <= set(shown)
    lengths = sorted(seconds[number] for number in shown)
    assert max(b - a for a, b in zip(lengths, lengths[1:], strict=False)) <= 3


def test_page_has_the_picture_and_says_what_it_does_not_show():
    report = example_report()
    html = render_html(report)
    assert HEADING in html and "are not." not in html and "73.9 % of the time" in html
    report["timeline"]["workers"] *= 20
    html = render_html(report)
    assert "16 of 40 workers are shown" in html and "24 are not." in html
    assert len(Drawing(html.split('<svg class="plot timeline"')[1].split("</svg>")[0]).tracks) == 2 * 16


@pytest.mark.parametrize("gone", ["timeline", "seconds"])
def test_report_of_an_older_version_has_no_picture(gone):
    report = example_report()
    del report[gone]
    assert HEADING not in render_html(report)


def test_report_without_workers_has_no_picture():
    empty = {"workers": [], "busy_share": None, "hidden_storage_share": None}
    assert HEADING not in render_html(example_report() | {"timeline": empty})


def test_names_of_stages_stay_text():
    hostile = "<script>alert(1)</script>\"'>"
    workers = [worker([(hostile, 0, 1)])]
    drawn = timeline(workers, 10) + legend(workers)
    assert "<script" not in drawn
    assert Drawing(timeline(workers, 10)).marks[0]["title"].startswith(hostile)


def test_terminal_view_tells_the_shares():
    assert "\ncompute lanes were busy 73.9 % of the time; 81.3 % of" in format_report(example_report())
