"""What a finished conversion shows in the Prefect UI: the rows of its block table and a summary in markdown.

Pure functions of the report; the figures are those of `quantlib.job.report_figures`, which the terminal and
the HTML report show too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlib.job import report_figures as figures
from quantlib.job import report_publication
from quantlib.job.report import HTML_NAME


def block_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a block for a table: linear error and damping are the largest among its linears."""
    return [_block_row(block) for block in report["blocks"]]


def _block_row(block: Mapping[str, Any]) -> dict[str, Any]:
    linears: Sequence[Mapping[str, Any]] = block["linears"]
    return {
        "block": block["index"],
        "relative error": _rounded(block["relative_error"]),
        "cosine": _rounded(block["cosine"]),
        "worst linear error": _rounded(_largest(linears, "relative_error")),
        "damping": _rounded(_largest(linears, "damping_fraction")),
        "fallbacks": sum(1 for linear in linears if linear.get("fallback")),
        "seconds": round(figures.block_seconds(block), 1),
    }


def _largest(linears: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return figures.largest([linear.get(name) for linear in linears])


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def summary_markdown(report: Mapping[str, Any]) -> str:
    """The whole run on one page, the verdict first."""
    rows = "\n".join(f"| {name} | {value} | {note} |" for name, value, note in _summary_rows(report))
    return (
        f"## {figures.model_name(report)}: {figures.request(report)}\n\n| | | |\n|---|---|---|\n{rows}\n\n"
        f"The full report is `{report_uri(report)}`; `quantmill report {report['output']}` shows it in a"
        " terminal.\n"
    )


def _summary_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for headline in figures.headlines(report):
        yield headline.name, f"**{headline.value}**", headline.note
    for gate, limit, figure, passed in report_publication.gate_rows(report):
        yield f"Gate {gate}", f"**{passed}**", f"{figure} of at most {limit}"
    for sentence in report_publication.sentences(report):
        what, _, detail = sentence.partition(":")
        yield "Publication", what, detail.strip()
    yield "Fallbacks", *_fallback_words(report["fallbacks"])
    yield "Source", f"`{report['source']}`", report["model_type"]
    yield "Output", f"`{report['output']}`", f"{len(report['shards'])} shards"
    for sentence in figures.history_sentences(report):
        what, _, detail = sentence.partition(":")
        yield what, detail.strip(), ""


def _fallback_words(fallbacks: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    kinds = sorted({str(fallback["kind"]) for fallback in fallbacks})
    counts = (f"{sum(1 for f in fallbacks if f['kind'] == kind)} x {kind}" for kind in kinds)
    return str(len(fallbacks)) if fallbacks else "none", ", ".join(counts)


def report_uri(report: Mapping[str, Any]) -> str:
    """Where the HTML report of a run lies."""
    return f"{report['output'].rstrip('/')}/{HTML_NAME}"
