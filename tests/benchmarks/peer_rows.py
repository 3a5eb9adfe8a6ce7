"""The table of peers: a row a tool, a section for each model and setting."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from variant_rows import Rows

SOURCE, QUANTMILL = "source", "quantmill"
_COLUMNS = (
    "tool",
    "CPU s",
    "x Quantmill",
    "of it quantizing",
    "x Quantmill",
    "GFLOP a CPU s",
    "wall s",
    "peak RSS GiB",
    "output MB",
    "perplexity",
    "ratio to the source",
    "standard error",
)


class PeerRows(Rows):
    """Finished rows, kept as those of the variants are, and the table they make.

    A row that failed is shown but not kept: started again, the command tries it again.
    """

    def __init__(self, table: Path) -> None:
        super().__init__(table, ())
        self._failed: list[dict[str, Any]] = []

    def add_failed(self, row: dict[str, Any]) -> None:
        """Show a row with its ``failure`` until a later start makes it."""
        self._failed.append(row)
        self.write_table()

    def write_table(self) -> None:
        self._table.write_text(markdown([*self.all, *self._failed]))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, a section for each setting, in the order they came."""
    sections = list(dict.fromkeys(json.dumps(row["key"]["setting"]) for row in rows))
    return "\n".join(
        _section([row for row in rows if json.dumps(row["key"]["setting"]) == text], json.loads(text))
        for text in sections
    )


def _section(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    length, threads = setting["sequence_length"], setting["threads"]
    ours = next((row for row in rows if row["key"]["side"] == QUANTMILL and "failure" not in row), None)
    lines = [
        f"## {setting['model']}, {setting['bits']} bits, symmetric, groups of {setting['group_size']}",
        "",
        f"Calibrated on {setting['sequences']} x {length} tokens, evaluated on"
        f" {setting['evaluation_sequences']} x {length}, {threads} thread{'s' if threads > 1 else ''}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    lines += [f"| {' | '.join(cells(row, ours))} |" for row in rows]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any], ours: Mapping[str, Any] | None) -> list[str]:
    """The cells of a row; ``ours`` is what its CPU seconds are set against."""
    if "failure" in row:
        return [row["label"], row["failure"].replace("|", "/"), *["-"] * (len(_COLUMNS) - 2)]
    if row["key"]["side"] == SOURCE:
        return [
            row["label"],
            *["-"] * 7,
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.3f}",
            "1",
            "-",
        ]
    cost, quantizing = row["cost"], _quantizing(row)
    return [
        row["label"],
        f"{cost['cpu_seconds']:.1f}",
        _ratio(cost["cpu_seconds"], ours["cost"]["cpu_seconds"] if ours else None),
        f"{quantizing:.1f}",
        _ratio(quantizing, _quantizing(ours) if ours else None),
        f"{row['gflop_per_cpu_second']:.0f}",
        f"{cost['wall_seconds']:.0f}",
        f"{cost['peak_rss_bytes'] / 2**30:.2f}",
        f"{row['size_bytes'] / 1e6:.1f}",
        f"{row['perplexity']:.3f}",
        f"{row['ratio']:.4f}",
        f"{row['ratio_standard_error']:.4f}",
    ]


def _quantizing(row: Mapping[str, Any]) -> float:
    """CPU seconds from the loaded source to the written output."""
    return row["cpu_seconds"]["quantize"] + row["cpu_seconds"]["save"]


def _ratio(seconds: float, of_ours: float | None) -> str:
    return f"{seconds / of_ours:.2f}" if of_ours else "-"
