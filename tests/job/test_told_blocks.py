"""What is told of blocks while a job runs, against the report at its end."""

from typing import Any

import pytest

from quantlib.inprocess import quantize, quantize_all
from quantlib.job.stages import Progress
from tests.support.tiny_jobs import tiny_options


class Listener:
    """Keeps what was told, in order."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, progress: Progress) -> None:
        self.labels.append(progress.label)
        for finished in progress.finished:
            self.rows.setdefault(finished.output, []).append(dict(finished.row))


def _without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The report's have the writing too.
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"propagation": "quantized"},
        {"evaluation": None},
        {"method": "rtn", "calibration": None, "evaluation": None},
    ],
    ids=["original", "quantized", "without evaluation", "without data"],
)
def test_every_block_is_told_once_as_the_report_has_it(tmp_path, given):
    told = Listener()
    report = quantize(tiny_options(tmp_path, **given), told)
    assert list(told.rows) == [report["output"]]
    assert _without_seconds(told.rows[report["output"]]) == _without_seconds(report["blocks"])
    assert all("unit" not in label for label in told.labels)


def test_outputs_made_together_are_told_each_by_its_address(tmp_path):
    told = Listener()
    requests = [
        tiny_options(tmp_path, output=str(tmp_path / scheme), scheme=scheme) for scheme in ("W4A16", "W8A16")
    ]
    reports = quantize_all(requests, told)
    assert list(told.rows) == [report["output"] for report in reports]
    for report in reports:
        assert _without_seconds(told.rows[report["output"]]) == _without_seconds(report["blocks"])


def test_blocks_that_are_run_again_after_an_interruption_are_told_again(tmp_path):
    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.label == "block 3/3: solve":
            raise StopError

    options = tiny_options(tmp_path)
    with pytest.raises(StopError):
        quantize(options, stop)
    told = Listener()
    report = quantize(options, told)
    assert report["history"]["reused_units"]
    rows = told.rows[report["output"]]
    assert _without_seconds(rows) == _without_seconds(report["blocks"])[-len(rows) :]
    assert rows[-1]["index"] == 2
