"""The picture and the table in the README are those that the command makes."""

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quantlib.simulation.scaling_picture import main, scaling_picture, scaling_runs, scaling_table

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "infra" / "pictures" / "scaling.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs():
    return scaling_runs()


def test_shipped_picture_is_what_the_command_draws(runs):
    command = "python -m quantlib.simulation.scaling_picture infra/pictures/scaling.svg"
    assert SHIPPED.read_text(encoding="utf-8") == scaling_picture(runs), f"run: {command}"


def test_readme_table_is_what_the_command_prints(runs):
    command = "python -m quantlib.simulation.scaling_picture --table"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert scaling_table(runs) in readme, f"put into the README what this prints: {command}"
    assert "infra/pictures/scaling.svg" in readme


def test_marks_stand_where_both_logarithmic_axes_say(runs):
    root = ElementTree.fromstring(scaling_picture(runs))
    texts = {text.text: text for text in root.findall(f"{SVG}text")}
    five, ten = (float(texts[tick].get("y", "")) for tick in ("5 min", "10 min"))
    one, two = (float(texts[tick].get("x", "")) for tick in ("1", "2"))
    for number, row in enumerate(runs.values()):
        circles = [c for c in root.findall(f"{SVG}circle") if c.get("class", "").endswith(f"c{number}")]
        for circle, found in zip(circles, row, strict=True):
            height = ten - 4 + (ten - five) * math.log2(found["seconds"] / 600)
            assert float(circle.get("cx", "")) == pytest.approx(
                one + (two - one) * math.log2(found["gpus"]), abs=0.5
            )
            assert float(circle.get("cy", "")) == pytest.approx(height, abs=0.5)
            fits = found["gpu_memory_bytes"]["total"] <= found["gpu_memory_size_bytes"]
            assert circle.get("class", "").startswith("mark" if fits else "hollow")


def test_ideal_line_halves_the_time_on_twice_the_gpus(runs):
    root = ElementTree.fromstring(scaling_picture(runs))
    texts = {text.text: text for text in root.findall(f"{SVG}text")}
    five, ten = (float(texts[tick].get("y", "")) for tick in ("5 min", "10 min"))
    one, two = (float(texts[tick].get("x", "")) for tick in ("1", "2"))
    lines = [line for line in root.findall(f"{SVG}line") if "ideal" in line.get("class", "")]
    assert len(lines) == len(runs)
    for line in lines:
        x1, x2, y1, y2 = (float(line.get(name, "")) for name in ("x1", "x2", "y1", "y2"))
        assert (y2 - y1) / (x2 - x1) == pytest.approx((five - ten) / (two - one), rel=0.01)


def test_every_text_and_mark_is_inside_and_colored_in_both_themes(runs):
    svg = scaling_picture(runs)
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for text in root.findall(f"{SVG}text"):
        x, size = float(text.get("x", "")), 8.2 if "title" in text.get("class", "") else 6.6
        if not {"end", "mid"} & set(text.get("class", "").split()):
            assert x + size * len(text.text or "") < width, text.text
        assert 0 < float(text.get("y", "")) < height
    light, dark = svg.split("prefers-color-scheme:dark")
    for name in {
        name for e in root.iter() for name in e.get("class", "").split() if re.fullmatch(r"[cn]\d", name)
    }:
        assert f".{name}{{" in light and f".{name}{{" in dark, name


def test_command_needs_something_to_do(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--table" in capsys.readouterr().err
