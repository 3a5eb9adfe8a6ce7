"""Several schemes from one reading in one table: the figures are those of runs by themselves."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from quantlib.__main__ import main
from quantlib.errors import QuantError, RecipeError, StorageError
from quantlib.inprocess import quantize, quantize_all
from quantlib.job.comparison_request import ComparisonRequest, comparison_request
from quantlib.job.comparison_run import compare
from quantlib.job.comparison_svg import comparison_picture
from quantlib.job.comparison_text import comparison_markdown, format_comparison
from quantlib.job.options import JobOptions
from quantlib.storage import open_store
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

ENTRIES = ("gptq:W4A16@32", "rtn:W8A16@32", "gptq:W3A16_ASYM@16", "rtn:W4A16_ASYM@-1", "gptq:W2A16@16")
COUNTS = {"sequences": 60, "sequence_length": 32, "evaluation_sequences": 40, "checkpoint_every": 0}
_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    tiny_source(folder / "source")
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=300)
    return folder


def given_values(root: Path, schemes: Sequence[str] = ENTRIES, **given: Any) -> dict[str, Any]:
    return {
        "source": str(root / "source"),
        "calibration": str(root / "calibration.jsonl"),
        "evaluation": str(root / "evaluation.jsonl"),
        **COUNTS,
        "threads_per_worker": 1,
        "device": "cpu",
        "runner": "inprocess",
        "schemes": list(schemes),
        **given,
    }


def request_of(root: Path, schemes: Sequence[str] = ENTRIES, **given: Any) -> ComparisonRequest:
    return comparison_request(given_values(root, schemes, **given))


@pytest.fixture(scope="module")
def alone(root) -> list[dict[str, Any]]:
    """Of every entry the report of a run of its own."""
    reports = []
    for number, entry in enumerate(ENTRIES):
        method, scheme, group_size = re.split("[:@]", entry)
        own = {"method": method, "scheme": scheme, "group_size": int(group_size)}
        output = str(root / "alone" / str(number))
        reports.append(quantize(tiny_options(root, **COUNTS, **own, propagation="original", output=output)))
    return reports


@pytest.fixture(scope="module")
def kept(root) -> dict[str, Any]:
    return compare(request_of(root, output=str(root / "kept")), quantize_all)


def folders(root: Path) -> list[Path]:
    names = ("gptq-W4A16-g32", "rtn-W8A16-g32", "gptq-W3A16_ASYM-g16", "rtn-W4A16_ASYM-row", "gptq-W2A16-g16")
    return [root / "kept" / name for name in names]


def test_figures_are_those_of_runs_by_themselves(root, alone, kept):
    assert [row["entry"] for row in kept["rows"]] == list(ENTRIES)
    for number, (row, report, folder) in enumerate(zip(kept["rows"], alone, folders(root), strict=True)):
        figures = report["evaluation"]
        assert row["perplexity"] == figures["perplexity_quantized"]
        assert row["ratio"] == figures["ratio"]
        assert row["kl_divergence"] == figures["kl_divergence"]
        assert row["size_bytes"] == report["bytes"]["output"]
        assert row["share"] == report["bytes"]["output"] / report["bytes"]["source"]
        assert row["output"] == f"file://{folder}"
        assert shard_digests(folder) == shard_digests(root / "alone" / str(number))
    assert kept["evaluation"]["perplexity"] == alone[0]["evaluation"]["perplexity_original"]
    assert kept["source_bytes"] == alone[0]["bytes"]["source"]


def test_source_is_read_once_for_all(root, alone, kept):
    assert kept["readings"] == 1
    reports = [json.loads((folder / "quantmill_report.json").read_text()) for folder in folders(root)]
    read = {report["bytes"]["read"] for report in reports}
    assert len(read) == 1
    assert read.pop() < 1.3 * max(report["bytes"]["read"] for report in alone)
    assert reports[0]["stages"]["capture"]["calls"] == alone[0]["stages"]["capture"]["calls"]
    assert kept["seconds"] == reports[0]["seconds"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: found for path in folder.glob("*.safetensors") for name, found in load_file(path).items()}


def weights_and_bits(folder: Path, source: Path) -> tuple[int, int]:
    """Weights of what is quantized in an output, and bits of all that the files hold in their place."""
    stored = {name.removesuffix(".weight"): found for name, found in tensors_of(source).items()}
    weights, bits = {}, 0
    for name, tensor in tensors_of(folder).items():
        linear, _, part = name.rpartition(".")
        if part != "weight" and linear in stored:
            bits += 8 * tensor.numel() * tensor.element_size()
            weights[linear] = stored[linear].numel()
    return sum(weights.values()), bits


def test_bits_a_weight_are_those_of_the_written_files(root, kept):
    for row, folder in zip(kept["rows"], folders(root), strict=True):
        weights, bits = weights_and_bits(folder, root / "source")
        assert row["bits_per_weight"] == bits / weights
    four, eight, three, whole, two = (row["bits_per_weight"] for row in kept["rows"])
    # Codes and a scale of 16 bits a group; two numbers of 64 bits say the shape of a linear.
    assert four == pytest.approx(4 + 16 / 32, abs=0.05)
    assert eight == pytest.approx(8 + 16 / 32, abs=0.05)
    assert three == pytest.approx(3 + (16 + 3) / 16, abs=0.05)
    assert 4.2 < whole < 4.4
    assert two == pytest.approx(2 + 16 / 16, abs=0.05)


def test_solve_seconds_are_an_outputs_own(kept, root):
    reports = [json.loads((folder / "quantmill_report.json").read_text()) for folder in folders(root)]
    for row, report in zip(kept["rows"], reports, strict=True):
        assert row["solve_seconds"] == report["own_stages"]["solve"]["seconds"] > 0
    whole = reports[0]["stages"]["solve"]
    assert sum(row["solve_seconds"] for row in kept["rows"]) == pytest.approx(whole["seconds"])
    assert sum(report["own_stages"]["solve"]["calls"] for report in reports) == whole["calls"]


def test_all_stages_of_a_run_by_itself_are_its_own(alone):
    assert all(report["own_stages"] == report["stages"] for report in alone)


def test_comparison_lies_beside_its_outputs_and_the_same_request_finds_it_finished(root, kept):
    assert json.loads((root / "kept" / "comparison.json").read_text()) == json.loads(json.dumps(kept))
    page = (root / "kept" / "comparison.md").read_text()
    assert page.startswith(comparison_markdown(kept))
    assert "(comparison.svg)" in page
    assert (root / "kept" / "comparison.svg").read_text() == comparison_picture(kept)
    again = compare(request_of(root, output=str(root / "kept")), quantize_all)
    assert again == json.loads(json.dumps(kept))


def test_entry_that_is_added_later_is_a_reading_of_its_own(root):
    output = str(root / "added")
    compare(request_of(root, ENTRIES[1:2], output=output), quantize_all)
    both = compare(request_of(root, ENTRIES[:2], output=output), quantize_all)
    assert both["readings"] == 2
    reports = [Path(row["output"].removeprefix("file://"), "quantmill_report.json") for row in both["rows"]]
    assert both["seconds"] == sum(json.loads(path.read_text())["seconds"] for path in reports)


def test_table_has_a_row_an_entry_and_says_what_departs(kept):
    text = format_comparison(kept)
    lines = text.splitlines()
    assert lines[1].split("  ")[0] == "scheme"
    rows = {line.split()[0]: line for line in lines[2:7]}
    assert list(rows) == list(ENTRIES)
    assert len({len(line) for line in lines[1:7]}) == 1
    for row in kept["rows"]:
        assert f"{row['bits_per_weight']:.4g}" in rows[row["entry"]]
        assert f"{row['ratio']:.5g}" in rows[row["entry"]]
    assert "gptq:W3A16_ASYM@16: calibrated on original activations" in text
    assert "from one reading of the source" in text
    markdown = comparison_markdown(kept).splitlines()
    assert sum(line.startswith("| gptq:") or line.startswith("| rtn:") for line in markdown) == len(ENTRIES)
    assert len({line.count("|") for line in markdown if line.startswith("|")}) == 1


def marks_of(picture: str) -> list[str]:
    titles = [found.text for found in ElementTree.fromstring(picture).iter(f"{_SVG}title")]
    return [title for title in titles if title and ":" in title]


def test_picture_has_a_mark_a_row_by_method(kept):
    picture = comparison_picture(kept)
    titles = marks_of(picture)
    assert [title.partition(": ")[0] for title in titles] == list(ENTRIES)
    tree = ElementTree.fromstring(picture)
    # One more of each in the legend.
    assert sum(found.get("class") == "m-gptq" for found in tree.iter(f"{_SVG}circle")) == 3 + 1
    assert sum(found.get("class") == "m-rtn" for found in tree.iter(f"{_SVG}rect")) == 2 + 1
    places = {
        title: (float(found.get("cx") or found.get("x")), float(found.get("cy") or found.get("y")))
        for found in tree.iter()
        if found.tag in (f"{_SVG}circle", f"{_SVG}rect") and (title := found.findtext(f"{_SVG}title"))
    }
    drawn = [places[title] for title in titles]
    for (row, place), (other, elsewhere) in combinations(zip(kept["rows"], drawn, strict=True), 2):
        if abs(row["bits_per_weight"] - other["bits_per_weight"]) > 0.2:
            assert (place[0] < elsewhere[0]) == (row["bits_per_weight"] < other["bits_per_weight"])
        if row["kl_divergence"] > 1.2 * other["kl_divergence"]:
            assert place[1] < elsewhere[1]


def test_row_without_figures_is_named_and_not_drawn(kept):
    broken = {**kept["rows"][0], "kl_divergence": None, "ratio": None, "perplexity": None}
    comparison = {**kept, "rows": [broken, *kept["rows"][1:]]}
    picture = comparison_picture(comparison)
    assert len(marks_of(picture)) == len(ENTRIES) - 1
    assert "Not drawn, without a figure: gptq:W4A16@32" in picture
    assert "  -  " in format_comparison(comparison)
    none = comparison_picture({**kept, "rows": [broken]})
    assert ElementTree.fromstring(none).tag == f"{_SVG}svg"


def test_entries_that_the_shapes_refuse_are_named_together_before_work(root, tmp_path):
    """Columns are 64 and 96."""
    request = request_of(
        root, ["W4A16@32", "W4A16@64", "rtn:W8A16@40", "rtn:W8A16@32"], work=str(tmp_path / "work")
    )
    with pytest.raises(RecipeError, match="2 of 4 outputs cannot be made") as refused:
        compare(request, quantize_all)
    assert refused.value.before_work
    message = refused.value.message
    assert re.search(r"gptq-W4A16-g64 \(.*down_proj: .* divides its 96 columns, got 64", message)
    assert re.search(r"rtn-W8A16-g40 \(.*q_proj: .* divides its 64 columns, got 40", message)
    assert "g32 (" not in message
    assert message.endswith("; without them gptq-W4A16-g32, rtn-W8A16-g32 can be made")
    assert not list((tmp_path / "work").glob("*"))


@pytest.mark.parametrize("place", [{"work": "ftp://x"}, {"output": "ftp://x"}])
def test_place_that_cannot_be_is_refused_before_work(root, place):
    with pytest.raises(StorageError, match="is not supported") as refused:
        compare(request_of(root, ENTRIES[:2], **place), quantize_all)
    assert refused.value.before_work


def test_quantized_propagation_is_refused_with_the_reason(root, tmp_path):
    request = request_of(root, ENTRIES[:2], propagation="quantized", work=str(tmp_path))
    with pytest.raises(RecipeError, match="need propagation original, found quantized") as refused:
        compare(request, quantize_all)
    assert refused.value.before_work
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_kept_are_gone(root, tmp_path, kept):

    def make(requests: Sequence[JobOptions]) -> list[dict[str, Any]]:
        reports = quantize_all(requests)
        (place,) = tmp_path.iterdir()
        made = {path.parent.name for path in place.glob("*/config.json")}
        assert made == {"gptq-W4A16-g32", "rtn-W8A16-g32"}
        return reports

    found = compare(request_of(root, ENTRIES[:2], work=str(tmp_path)), make)
    assert not list(tmp_path.iterdir())
    assert found["output"] is None
    assert [row["output"] for row in found["rows"]] == [None, None]
    for row, other in zip(found["rows"], kept["rows"], strict=False):
        assert (row["ratio"], row["size_bytes"]) == (other["ratio"], other["size_bytes"])


@pytest.mark.parametrize("failure", [QuantError("full"), KeyboardInterrupt(), RuntimeError("a defect")])
def test_outputs_of_a_comparison_that_fails_are_gone(root, tmp_path, failure):
    def stop(progress: Any) -> None:
        if progress.label == "block 3/3: solve":
            assert list(tmp_path.rglob("*.safetensors")), "something is there to be removed"
            raise failure

    with pytest.raises(type(failure)):
        compare(
            request_of(root, ENTRIES[:2], work=str(tmp_path)), lambda requests: quantize_all(requests, stop)
        )
    assert not list(tmp_path.iterdir())


def test_kept_outputs_of_a_comparison_that_was_interrupted_are_finished(root, kept):
    def stop(progress: Any) -> None:
        if progress.label == "block 3/3: solve":
            raise KeyboardInterrupt

    request = request_of(root, ENTRIES[:2], output=str(root / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        compare(request, lambda requests: quantize_all(requests, stop))
    found = compare(request, quantize_all)
    for row, other in zip(found["rows"], kept["rows"], strict=False):
        assert (row["ratio"], row["kl_divergence"]) == (other["ratio"], other["kl_divergence"])
    assert any("of an earlier start" in note for note in found["notes"])


def line_of(values: dict[str, Any]) -> list[str]:
    flags = {name: value for name, value in values.items() if name not in ("source", "schemes")}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["compare", values["source"], "--schemes", *values["schemes"], *words]


def test_command_prints_the_table_or_its_values(root, tmp_path, capsys, kept):
    values = given_values(root, ENTRIES[:2], work=str(tmp_path))
    assert main(line_of(values)) == 0
    shown = capsys.readouterr().out
    assert shown.count("gptq:W4A16@32") == 1
    assert f"{kept['rows'][0]['ratio']:.5g}" in shown
    assert main([*line_of(values), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["ratio"] == kept["rows"][1]["ratio"]
    assert main(line_of({**values, "schemes": ["W4A16@40"]})) == 2
    assert "divides its 64 columns" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outputs_of_a_comparison_that_is_ended_from_outside_are_gone(root, tmp_path, number):
    work = tmp_path / "work"
    text = str(tiny_text(tmp_path / "long.jsonl", documents=4000))
    long = {"calibration": text, "evaluation": text, "sequences": 3000, "evaluation_sequences": 3000}
    values = given_values(root, work=str(work), **long)
    process = subprocess.Popen(
        [sys.executable, "-m", "quantlib", *line_of(values)],
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores interrupts, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not list(work.rglob("plan.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "nothing is kept, the same command starts over" in shown
    assert not list(work.iterdir())


@pytest.mark.slow
def test_objects_of_a_comparison_that_fails_are_gone(root, s3_environment):
    place = s3_environment.uri("compared")
    request = request_of(root, ENTRIES[1:2], work=place)

    def stop(progress: Any) -> None:
        if progress.label == "head":
            raise QuantError("full")

    def make(requests: Sequence[JobOptions]) -> list[dict[str, Any]]:
        assert all(options.output.startswith(f"{place}/") for options in requests)
        return quantize_all(requests, stop)

    with pytest.raises(QuantError, match="full"):
        compare(request, make)
    assert not open_store(place).list(place)
