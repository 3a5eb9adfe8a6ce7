"""The table of variants on a tiny model: rows are kept, and started again only missing ones are made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow


def test_variants_makes_each_row_once(tmp_path):
    tiny_source(tmp_path / "model")
    texts = [
        tiny_text(tmp_path / f"{name}.jsonl", seed=n) for n, name in enumerate(("calibration", "evaluation"))
    ]
    table = tmp_path / "table.md"
    command = [
        sys.executable,
        str(Path(__file__).with_name("variants.py")),
        "--models",
        str(tmp_path / "model"),
    ]
    command += ["--bits", "3", "--variants", "rtn-minmax", "hessian-descent-2-refit", "--group-size", "32"]
    command += ["--sequences", "4", "--sequence-length", "32", "--evaluation-sequences", "3"]
    command += ["--calibration", str(texts[0]), "--evaluation", str(texts[1])]
    command += ["--cache", str(tmp_path / "cache"), "--output", str(table)]

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    assert "4 of 4 rows" in run()
    first, lines = table.read_text(), table.with_suffix(".jsonl").read_text()
    rows = {
        (row["key"]["variant"], row["key"]["is_symmetric"]): row["mean_relative_error"]
        for row in map(json.loads, lines.splitlines())
        if row["key"]["variant"] != "source"
    }
    assert len(rows) == 4
    for is_symmetric in (True, False):
        assert rows["hessian-descent-2-refit", is_symmetric] < rows["rtn-minmax", is_symmetric]
    # A run that was killed while it wrote its last row.
    table.with_suffix(".jsonl").write_text(lines[:-20])
    assert "1 of 4 rows" in run()
    again = [json.loads(line) for line in table.with_suffix(".jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in lines.splitlines()]
    assert [row["row_losses"] for row in again] == [row["row_losses"] for row in before]
    assert first.splitlines()[:6] == table.read_text().splitlines()[:6]
