"""The report of a run for a terminal, as plain text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from quantlib.job import report_experts, report_publication
from quantlib.job import report_figures as figures
from quantlib.job.accounts import account_lines
from quantlib.job.report_figures import is_number, number
from quantlib.job.text_sources import described

_LISTED = 5
# Eight heights of a block character, lowest first.
_LEVELS = "".join(chr(0x2581 + height) for height in range(8))


def format_report(report: Mapping[str, Any]) -> str:
    """The whole terminal view of a report (the JSON of ``quantmill_report.json``)."""
    parts = (
        format_summary(report),
        _stages(report),
        _texts(report),
        "\n".join(account_lines(report.get("tensors") or ())),
        _kinds(report),
        _worst(report),
        _exceptions(report),
        _blocks(report),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def format_summary(report: Mapping[str, Any]) -> str:
    """What was converted and how well: the lines that end a run."""
    lines = [": ".join(filter(None, (figures.model_name(report), figures.request(report))))]
    headlines = figures.headlines(report)
    width = max(len(headline.name) for headline in headlines)
    for headline in headlines:
        note = f"   {headline.note}" if headline.note else ""
        lines.append(f"  {headline.name:<{width}}  {headline.value}{note}")
    for gate, limit, figure, passed in report_publication.gate_rows(report):
        lines.append(f"  Gate {gate} {passed}: {figure} of at most {limit}")
    lines += [f"  {sentence}" for sentence in report_publication.sentences(report)]
    return "\n".join(lines)


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value, its height from zero to the largest; a blank for None.

    >>> len(sparkline([0.0, 0.5, None, 1.0]))
    4
    """
    top = figures.largest(values)
    if not top:
        return "".join(" " if value is None else _LEVELS[0] for value in values)
    return "".join(
        " " if value is None else _LEVELS[max(0, min(7, int(8 * value / top)))] for value in values
    )


def _stages(report: Mapping[str, Any]) -> str:
    stages = sorted((report.get("stages") or {}).items(), key=lambda item: -(item[1].get("seconds") or 0))
    rows = [
        (
            name,
            number(stage.get("seconds")),
            number(stage.get("cpu_seconds")),
            figures.count(stage.get("calls")),
        )
        for name, stage in stages
    ]
    text = text_table(("stage", "seconds", "CPU seconds", "calls"), rows) if rows else ""
    peaks = figures.part(report.get("memory"), "worker_peak_memory_bytes") or ()
    planned = figures.planned_memory(report)
    moved = report.get("bytes") or {}
    facts = []
    if peaks:
        words = f" (planned at most {figures.size(sum(planned.values()))})" if planned else ""
        facts.append(f"peak memory of the workers: {', '.join(figures.size(peak) for peak in peaks)}{words}")
    if is_number(moved.get("read")):
        facts.append(f"read {figures.size(moved['read'])}, written {figures.size(moved.get('written'))}")
    if sentence := figures.lanes_sentence(report):
        facts.append(sentence[0].lower() + sentence[1:].rstrip("."))
    return "\n".join([*([text] if text else []), *facts])


def _texts(report: Mapping[str, Any]) -> str:
    lines = []
    for name in ("calibration", "evaluation"):
        for text in figures.part(report.get(name), "texts") or ():
            lines.append(f"{name}: {described(text)}")
    return "\n".join(lines)


def _kinds(report: Mapping[str, Any]) -> str:
    rows = [
        (kind, number(figures.largest(values)), sparkline(values))
        for kind, values in figures.by_kind(report, "relative_error").items()
        if figures.largest(values) is not None
    ]
    return text_table(("kind of linear", "worst error", "first block to last"), rows) if rows else ""


def _worst(report: Mapping[str, Any]) -> str:
    rows = [
        (str(x.get("name")), number(x["relative_error"]), number(x.get("damping_fraction")))
        for x in figures.worst_linears(report, _LISTED)
    ]
    lines = [text_table(("worst linears", "error", "damping"), rows)] if rows else []
    if outliers := figures.outlier_sentence(report):
        lines.append(outliers)
    return "\n".join(lines)


def _exceptions(report: Mapping[str, Any]) -> str:
    """Fallbacks, excluded rows, dropped tensors: everything that is not as it was asked for."""
    fallbacks = report.get("fallbacks") or ()
    lines = [f"fallbacks: {len(fallbacks) or 'none'}"]
    lines += [f"  {x.get('linear')}: {x.get('kind')}, {x.get('detail')}" for x in fallbacks]
    if experts := report_experts.sentence(report):
        lines.append(experts)
    if excluded := figures.part(report.get("calibration"), "excluded_rows"):
        lines.append(f"calibration rows excluded: {', '.join(str(row) for row in excluded)}")
    for name, reason in (report.get("dropped") or {}).items():
        lines.append(f"dropped: {name}: {reason}")
    lines += [sentence[0].lower() + sentence[1:] for sentence in figures.history_sentences(report)]
    return "\n".join(lines)


def _blocks(report: Mapping[str, Any]) -> str:
    blocks = report.get("blocks") or ()
    rows = [
        (
            str(block.get("index")),
            number(block.get("relative_error")),
            number(block.get("cosine"), 6),
            number(figures.largest(list(_errors(block)))),
            number(figures.block_seconds(block), 3),
        )
        for block in blocks
    ]
    return text_table(("block", "relative error", "cosine", "worst linear", "seconds"), rows) if rows else ""


def _errors(block: Mapping[str, Any]) -> Iterator[float]:
    for linear in block.get("linears") or ():
        if is_number(linear.get("relative_error")):
            yield linear["relative_error"]


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text; the first stands at the left, the others at the right of their column."""
    every = (heads, *rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(heads))]
    lines = []
    for row in every:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)
