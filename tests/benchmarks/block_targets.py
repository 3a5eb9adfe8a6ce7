"""What is wanted of one H200, each in a line beside what was reached."""

from collections.abc import Mapping
from typing import Any

from block_solve import OURS

_STATISTICS_SHARE, _TIMES_FLOOR, _SOLVE_S = 0.6, 2.5, 1.2
_SOLVE_SIZE = (8192, 28672)
# The figures of the report: no part of choosing codes.
_ENERGIES = ("weight energy", "error energy")


def block_targets(figures: Mapping[str, Any]) -> list[str]:
    """Of a block, from `block_tables.block_figures`."""
    statistics = {part["part"]: part["times_floor"] for part in figures["parts"]}.get("statistics")
    rate = f"of the sustained rate of {figures['compute_dtype']} products"
    reached = "not told apart from other parts" if statistics is None else f"{1 / statistics:.0%} {rate}"
    return [
        f"statistics: {reached} (wanted of a GPU: at least {_STATISTICS_SHARE:.0%})",
        f"block: {figures['block']['times_floor']:.2f} x its floor (wanted of a GPU, of llama-3.1-405b with"
        f" 512 x 2048 tokens: at most {_TIMES_FLOOR} x)",
    ]


def solve_targets(figures: Mapping[str, Any]) -> list[str]:
    """Of the weight that is wanted, where it is among those of `block_tables.solve_figures`."""
    ours = [row for row in figures["rows"] if row["tool"] == OURS]
    lines = []
    for row, parts in zip(ours, figures["our_parts"], strict=True):
        if (row["rows"], row["columns"]) == _SOLVE_SIZE:
            without_s = row["seconds"] - sum(parts.get(part, 0.0) for part in _ENERGIES)
            lines += [
                "",
                f"solve of {row['rows']} x {row['columns']} with its factor: {without_s:.2f} s, with the"
                f" energies of the report {row['seconds']:.2f} s (wanted of a GPU: at most {_SOLVE_S} s)",
            ]
    return lines
