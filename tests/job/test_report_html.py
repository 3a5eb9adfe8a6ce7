"""The HTML report: well formed, self-contained, complete, and safe against what names may hold."""

import re
from html.parser import HTMLParser

import pytest

from quantlib.job.report_html import render_html
from quantlib.job.report_svg import heat_map, line_chart, nice_top
from tests.support.report_example import KINDS, example_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;"
VOID = {"meta", "br"}
LOADING_ATTRIBUTES = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            found == tag and all(values.get(name) == value for name, value in attributes.items())
            for found, values in self.tags
        )


def cells(page: Page) -> int:
    return sum(1 for tag, values in page.tags if tag == "rect" and "fill-opacity" in values)


def test_figures_of_the_report_appear():
    text = Page(render_html(example_report())).text
    for figure in ("14.374", "15.801", "x 1.0993", "+9.9 %", "16,352", "0.0942"):
        assert figure in text
    for figure in ("269.0 MB", "113.2 MB", "2.38 times smaller", "4 min 12 s", "298.4"):
        assert figure in text
    for figure in ("96.1 s", "63.4 CPU s", "1.1 GB", "1.2 GB", "325.0 MB", "ef" * 32, "2.13.0+cpu", "W4A16"):
        assert figure in text


def test_every_block_and_every_linear_is_drawn_with_its_value():
    page = Page(render_html(example_report(num_blocks=5)))
    assert page.count("circle") == 5
    assert cells(page) == 5 * len(KINDS)
    assert "block 4: 0.13" in page.text
    assert "self_attn.q_proj, block 4: 0.07" in page.text


def test_page_loads_nothing():
    html = render_html(example_report())
    page = Page(html)
    assert not {name for _, values in page.tags for name in values} & LOADING_ATTRIBUTES
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://|url\(|@import", html)


def test_hostile_names_stay_text():
    report = example_report()
    report["source"] = report["output"] = f"s3://bucket/{HOSTILE}"
    report["blocks"][0]["linears"][0]["name"] = f"model.layers.0.{HOSTILE}"
    report["fallbacks"] = [{"linear": HOSTILE, "kind": HOSTILE, "detail": HOSTILE}]
    report["dropped"] = {HOSTILE: HOSTILE}
    report["tensors"][0] |= {"state": HOSTILE, "reason": HOSTILE, "names": [HOSTILE]}
    report["calibration"]["texts"][0]["uri"] = HOSTILE
    report["options"][HOSTILE] = HOSTILE
    report["stages"][HOSTILE] = {"seconds": 1.0, "cpu_seconds": 1.0, "calls": 1}
    report["versions"] = {HOSTILE: HOSTILE}
    report["shards"][0]["name"] = HOSTILE
    report["evaluation"] = {"no_figures_because": HOSTILE}
    clean, attacked = Page(render_html(example_report())), Page(render_html(report))
    assert {tag for tag, _ in attacked.tags} == {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, values in attacked.tags for name in values)
    assert attacked.text.count(HOSTILE) >= 16


def test_tensors_of_the_source_and_texts_are_told():
    text = Page(render_html(example_report())).text
    assert "What became of the 218 tensors of the source" in text
    for words in ("to 4 bits, symmetric, groups of 64", "model.layers.*.self_attn.q_proj.weight", "212.3 MB"):
        assert words in text
    assert "19 sequences of s3://texts/chat.parquet, column messages" in text


def test_missing_evaluation_is_said():
    report = example_report()
    report["evaluation"] = None
    for block in report["blocks"]:
        block["relative_error"] = block["cosine"] = None
    page = Page(render_html(report))
    assert "no evaluation text was given" in page.text
    assert page.count("circle") == 0
    assert cells(page) == 3 * len(KINDS)


def test_reason_for_missing_figures_is_said():
    report = example_report()
    report["evaluation"] = {"no_figures_because": "block 3 was resumed"}
    assert "block 3 was resumed" in Page(render_html(report)).text


def test_round_to_nearest_without_calibration_has_neither_errors_nor_damping():
    report = example_report()
    report["calibration"] = None
    for block in report["blocks"]:
        for linear in block["linears"]:
            linear.update(method="rtn", relative_error=None, damping_fraction=None, damping_attempts=None)
    page = Page(render_html(report))
    assert cells(page) == 0
    assert "Damping" not in page.texts
    assert page.count("circle") == 3


def test_one_block_is_one_mark():
    page = Page(render_html(example_report(num_blocks=1)))
    assert page.count("circle") == 1
    assert page.count("polyline") == 0


def test_raised_damping_is_drawn_and_told():
    report = example_report()
    report["blocks"][1]["linears"][6].update(damping_fraction=0.04, damping_attempts=3)
    page = Page(render_html(report))
    assert "0.01 to 0.04; at most 3 attempts" in page.text
    assert cells(page) == 2 * 3 * len(KINDS)


def test_what_went_wrong_stands_above_the_plots():
    report = example_report()
    report["fallbacks"] = [{"linear": "model.layers.0.mlp.up_proj", "kind": "rtn", "detail": "0 tokens"}]
    report["calibration"]["excluded_rows"] = [3, 17]
    report["history"] = {
        "reused_units": ["block-00000"],
        "redone_units": {"block-00001": "the shard is missing"},
        "from_checkpoint": 2,
        "replayed_blocks": [2, 3, 4],
        "unusable_checkpoints": ["wrong sha256"],
        "retries": {"block 3/5: write": 2},
        "renewals": [{"because": "a worker was lost", "workers": 3}],
        "aborted_uploads": 4,
    }
    report["dropped"] = {"lm_head.weight": "equal to the embedding"}
    text = Page(render_html(report)).text
    warnings = text.split("Relative output error of each block")[0]
    assert "Fallbacks: 1" in warnings
    assert "2 (3, 17)" in warnings
    for words in (
        "earlier start and intact: 1 units",
        "block-00001, because the shard is missing",
        "before block 2",
        "finished blocks: 3",
        "could not be used: wrong sha256",
        "block 3/5: write, 2 times",
        "anew (3 of them): a worker was lost",
        "lost workers spent and moved is not in the figures",
        "given up: 4",
    ):
        assert words in warnings
    assert "equal to the embedding" in text


@pytest.mark.parametrize("name", sorted(example_report()))
def test_any_part_may_be_missing(name):
    for value in ("absent", None):
        report = example_report()
        if value is None:
            report[name] = None
        else:
            del report[name]
        Page(render_html(report))


def test_report_without_anything_is_a_page():
    assert "not measured" in Page(render_html({})).text


def test_experts_share_a_row_that_shows_the_worst():
    report = example_report(num_blocks=1)
    template = report["blocks"][0]["linears"][0]
    report["blocks"][0]["linears"] = [
        template | {"name": f"model.layers.0.mlp.experts.{e}.up_proj", "relative_error": 0.1 + 0.01 * e}
        for e in range(4)
    ]
    page = Page(render_html(report))
    assert cells(page) == 1
    assert "mlp.experts.*.up_proj, block 0: 0.13" in page.text


def test_line_falls_as_values_do_and_gaps_split_it():
    svg = line_chart([1.0, 0.5, None, 0.25, 0.0], list("abcde"), x_label="x", y_label="y")
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert heights == sorted(heights)
    assert heights[1] == pytest.approx((heights[0] + heights[3]) / 2, abs=0.1)
    assert svg.count("<polyline") == 2


def test_larger_value_is_stronger_in_the_heat_map():
    svg = heat_map({"a": [0.0, 0.5, 1.0, None]}, list("wxyz"), x_label="x")
    strengths = [float(found) for found in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert strengths == sorted(set(strengths))
    assert strengths[-1] == 1.0
    assert svg.count('class="empty"') == 1


@pytest.mark.parametrize("value", [1e-9, 0.0999, 0.1, 0.31, 1.0, 7.3, 9.99, 12345.0])
def test_axis_holds_its_largest_value_without_wasting_half(value):
    assert value <= nice_top(value) * (1 + 1e-9)
    assert nice_top(value) <= 1.7 * value
