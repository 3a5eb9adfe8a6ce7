"""What a finished conversion shows in the Prefect UI: the rows of its block table and a summary in markdown.

Pure functions of the report; the figures are those of `quantlib.job.report_figures`, which the terminal and
the HTML report show too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlib.job import report_figures as figures
from quantlib.job import report_publication
from quantlib.job.block_figures import BlockFigures, fallback_words
from quantlib.job.report import HTML_NAME
from quantlib.job.report_verdict import concerns, verdict


def block_table(blocks: Mapping[str, Sequence[BlockFigures]]) -> list[dict[str, Any]]:
    """One row a block for a table, in the order of the blocks; of several outputs that of each.

    Args:
        blocks: Address of an output -> figures of its blocks, in any order.
    """
    several = len(blocks) > 1
    rows = [(found, output) for output, figures_of in blocks.items() for found in figures_of]
    rows.sort(key=lambda row: row[0].index)
    return [_block_row(found, output_name(output) if several else None) for found, output in rows]


def _block_row(found: BlockFigures, output: str | None) -> dict[str, Any]:
    return {
        "block": found.index + 1,
        **({} if output is None else {"output": output}),
        "relative error": _rounded(found.relative_error),
        "cosine": _rounded(found.cosine, 6),
        "worst linear": found.worst_linear,
        "its error": _rounded(found.worst_error),
        "damping": _rounded(found.damping),
        "fallbacks": fallback_words(found.fallbacks) or "none",
        "seconds": round(found.seconds, 1),
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def summary_markdown(report: Mapping[str, Any]) -> str:
    """The whole run on one page: the verdict, what speaks against it or happened on the way, the figures."""
    warnings = [*concerns(report), *figures.history_sentences(report)]
    rows = (f"| {name} | {value} | {note} |" for name, value, note in _summary_rows(report))
    parts = (
        f"**{verdict(report)}**",
        "\n".join(f"- {warning}" for warning in warnings),
        f"{figures.model_name(report)}: {figures.request(report)}",
        "\n".join(("| | | |", "|---|---|---|", *rows)),
        "\n".join(_address_lines(report)),
        f"`quantmill report {report['output']}` shows the report in a terminal.",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for headline in figures.headlines(report):
        yield headline.name, f"**{headline.value}**", headline.note
    for gate, limit, figure, passed in report_publication.gate_rows(report):
        yield f"Gate {gate}", f"**{passed}**", f"{figure} of at most {limit}"
    for sentence in report_publication.sentences(report):
        what, _, detail = sentence.partition(":")
        yield "Publication", what, detail.strip()


def _address_lines(report: Mapping[str, Any]) -> Iterator[str]:
    # Below the table: the page of an artifact breaks no address, and one would push the columns off it.
    yield f"- Source, {report['model_type']}: `{report['source']}`"
    yield f"- Output, {len(report['shards'])} shards: `{report['output']}`"
    yield f"- Report: `{report_uri(report)}`"


def output_name(uri: str) -> str:
    """The last part of an output's address."""
    return uri.rstrip("/").rpartition("/")[2]


def report_uri(report: Mapping[str, Any]) -> str:
    """Where the HTML report of a run lies."""
    return f"{report['output'].rstrip('/')}/{HTML_NAME}"
