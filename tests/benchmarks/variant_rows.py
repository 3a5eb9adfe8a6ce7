"""Rows of the table of variants: kept as they come, shown as markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Rows:
    """Finished rows: one JSON object a line in a file beside the table, written the moment they are known.

    Args:
        table: The markdown file; the rows are in a ``.jsonl`` beside it.
        order: Names of variants in the order of the table.
    """

    def __init__(self, table: Path, order: Sequence[str]) -> None:
        self._table, self._lines, self.all = table, table.with_suffix(".jsonl"), []
        self._order = order
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        if self._lines.is_file():
            # A run that was killed may have left half a line at the end.
            whole, newline, _ = self._lines.read_text().rpartition("\n")
            self._lines.write_text(whole + newline)
            self.all = [json.loads(line) for line in whole.splitlines()]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished row of a key."""
        return next((row for row in self.all if row["key"] == key), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and write the table anew."""
        self.all.append(row)
        with self._lines.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        self.write_table()

    def write_table(self) -> None:
        """All rows of the file as markdown, a section for each setting."""
        settings = list(dict.fromkeys(json.dumps(row["key"]["setting"]) for row in self.all))
        self._table.write_text(
            "\n".join(_section(json.loads(text), self.all, self._order) for text in settings)
        )


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "variant": lambda row: row["key"]["variant"],
    "model": lambda row: row["key"]["model"],
    "bits": lambda row: str(row["key"]["bits"]),
    "symmetric": lambda row: "yes" if row["key"]["is_symmetric"] else "no",
    "seed": lambda row: "-" if row["key"]["seed"] is None else str(row["key"]["seed"]),
    "ratio of perplexities": lambda row: f"{row['ratio']:.4f}",
    "standard error": lambda row: _or_dash(row["ratio_standard_error"]),
    "mean relative error": lambda row: f"{row['mean_relative_error']:.6f}",
    "solve CPU s": lambda row: f"{row['solve_cpu_seconds']:.1f}",
    "fallbacks": lambda row: str(row["fallbacks"]),
}


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _section(setting: Mapping[str, int], rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    found = [row for row in rows if row["key"]["setting"] == setting]
    sources = [row for row in found if row["key"]["variant"] == "source"]
    others = sorted((row for row in found if row not in sources), key=lambda row: _place(row, order))
    length = setting["sequence_length"]
    heading = f"## Groups of {setting['group_size']}, calibrated on {setting['sequences']} x {length} tokens,"
    heading += f" evaluated on {setting['evaluation_sequences']} x {length}"
    perplexities = [f"{row['key']['model']}: source perplexity {row['perplexity']:.4f}" for row in sources]
    lines = [
        heading,
        "",
        "; ".join(perplexities),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in others]
    digests = {row["solver_digest"] for row in others}
    if len(digests) > 1:
        lines += ["", f"These rows were made by {len(digests)} states of the solver's code."]
    return "\n".join(lines) + "\n"


def _place(row: Mapping[str, Any], order: Sequence[str]) -> tuple[Any, ...]:
    key = row["key"]
    number = order.index(key["variant"]) if key["variant"] in order else len(order)
    return key["model"], -key["bits"], not key["is_symmetric"], number, key["seed"] or 0
