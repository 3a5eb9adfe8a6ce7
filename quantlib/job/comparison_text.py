"""A comparison as aligned text for a terminal, and as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlib.job import report_figures as figures
from quantlib.job.report_figures import number
from quantlib.job.report_text import text_table

_HEADS = (
    "scheme",
    "bits a weight",
    "size",
    "of the source",
    "perplexity",
    "ratio",
    "KL divergence",
    "solve seconds",
)


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The table with what belongs to it, for a terminal."""
    lines = [_title(comparison), text_table(_HEADS, _rows(comparison)), *_remarks(comparison)]
    if comparison["output"] is not None:
        lines.append(f"outputs, this table and its picture: {comparison['output']}")
    return "\n".join(lines)


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    rows = ["| " + " | ".join(row) + " |" for row in (_HEADS, *_rows(comparison))]
    rows.insert(1, "|---|" + "---:|" * (len(_HEADS) - 1))
    remarks = [f"- {remark}" for remark in _remarks(comparison)]
    return "\n\n".join((f"# {_title(comparison)}", "\n".join(rows), "\n".join(remarks))) + "\n"


def _title(comparison: Mapping[str, Any]) -> str:
    evaluation = comparison["evaluation"]
    return (
        f"{figures.model_name(comparison)}, {figures.size(comparison['source_bytes'])}: perplexity"
        f" {number(evaluation['perplexity'], 5)} on {figures.count(evaluation['tokens'])} held-out tokens"
    )


def _rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in comparison["rows"]:
        yield (
            row["entry"],
            number(row["bits_per_weight"]),
            figures.size(row["size_bytes"]),
            figures.percent(row["share"]),
            number(row["perplexity"], 5),
            number(row["ratio"], 5),
            number(row["kl_divergence"]),
            number(row["solve_seconds"], 3),
        )


def _remarks(comparison: Mapping[str, Any]) -> Sequence[str]:
    count = comparison["readings"]
    readings = "one reading" if count == 1 else f"{count} readings"
    workers = f"{comparison['workers']} worker{'' if comparison['workers'] == 1 else 's'}"
    whole = (
        f"{comparison['format']} from {readings} of the source, {figures.duration(comparison['seconds'])} in"
        f" all on {workers} ({comparison['device_kind']}); solve seconds are those of an output alone, the"
        " rest is shared"
    )
    return (whole, *comparison["notes"])
