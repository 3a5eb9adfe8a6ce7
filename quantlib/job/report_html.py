"""The report of a run as one HTML file that needs nothing else.

No script, no font, no image, no address is loaded: style and plots stand inside the file, and its own content
policy forbids the rest. Light and dark follow the reader's system. Every text that comes from the report is
escaped; a part that the report lacks is left out or said to be missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from quantlib.job import report_experts, report_publication, report_timeline
from quantlib.job import report_figures as figures
from quantlib.job import report_svg as svg
from quantlib.job.report_figures import is_number, number
from quantlib.job.report_verdict import concerns
from quantlib.job.text_sources import described

_LISTED = 10
_RUN_FACTS = (
    "tool",
    "identity",
    "model_type",
    "runner",
    "workers",
    "threads_per_worker",
    "device_kind",
    "compute_dtype",
)
_COLUMN_KINDS = {"#": ' class="n"', "=": ' class="id"'}

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#5b6470;--rule:#dfe3e8;
--accent:#2457d6;--warn:#9a4b00;--warn-card:#fff4e5}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1c2026;--text:#e6e9ed;--soft:#9aa4b0;
--rule:#333a43;--accent:#86a9ff;--warn:#ffb86b;--warn-card:#33271a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.5rem;line-height:1.25;margin:0}
h2{font-size:1.05rem;margin:0 0 4px}
p{margin:0 0 10px}
.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:12px;margin:20px 0 12px}
section,.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px}
section{margin-top:12px;min-width:0}
.tile b{display:block;font-size:1.25rem;line-height:1.35;font-weight:600;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:12px;margin-top:12px}
.pair section{margin:0}
.warn{background:var(--warn-card);color:var(--warn);border-color:currentColor}
.wide{overflow-x:auto}
.tile b span{white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:.9rem;overflow-wrap:normal}
.facts td{overflow-wrap:anywhere}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.id{font-family:ui-monospace,monospace;font-size:.82rem}
details>summary{cursor:pointer;color:var(--soft)}
svg.plot{display:block;width:100%;min-width:440px;max-width:760px;height:auto}
svg text{font:12px system-ui,sans-serif}
.tick{fill:var(--soft)}.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--rule)}
.line{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.mark,.fill{fill:var(--accent)}
.empty{fill:none;stroke:var(--rule)}
.bars{display:grid;grid-template-columns:minmax(70px,max-content) 1fr max-content;gap:6px 10px;
align-items:center;font-size:.9rem}
svg.bar{display:block;width:100%;height:12px;background:var(--page);border-radius:3px}
svg.timeline{min-width:960px;max-width:none;margin-bottom:8px}
.track{fill:var(--page)}
.legend p{margin:0 0 4px;display:flex;flex-wrap:wrap;gap:2px 14px}
.legend span{white-space:nowrap}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
.v{font-variant-numeric:tabular-nums;text-align:right}
"""


def render_html(report: Mapping[str, Any]) -> str:
    """The whole page for a report (the JSON of ``quantmill_report.json``)."""
    title = f"{figures.model_name(report)}, quantized"
    body = "".join(
        (
            _head(report),
            _warnings(report),
            _publication(report),
            f'<div class="pair">{_block_error(report)}{_kinds(report)}{_damping(report)}{_experts(report)}',
            f"{_stages(report)}{_memory(report)}{_fallbacks(report)}</div>",
            _timeline(report),
            _worst(report),
            _blocks(report),
            _tensors(report),
            _shards(report),
            _settings(report),
        )
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{report_timeline.style()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(report: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile"><span class="soft">{escape(headline.name)}</span>'
        f"<b>{_arrows(headline.value)}</b>{escape(headline.note)}</div>"
        for headline in figures.headlines(report)
    )
    when = " to ".join(str(report[name]) for name in ("started", "finished") if report.get(name))
    addresses = f"{report.get('source', '')} -> {report.get('output', '')}"
    return (
        f"<header><h1>{escape(figures.model_name(report))}</h1><p>{escape(figures.request(report))}</p>"
        f'<p class="soft">{_arrows(addresses)}<br>{escape(when)}</p></header><div class="tiles">{tiles}</div>'
    )


def _warnings(report: Mapping[str, Any]) -> str:
    """What a reader must know before trusting the figures above."""
    found = [*concerns(report), *figures.history_sentences(report)]
    sentences = "<br>".join(escape(sentence) for sentence in found)
    return f'<section class="warn">{sentences}</section>' if found else ""


def _publication(report: Mapping[str, Any]) -> str:
    """What the output was held to; nothing where it was held to nothing."""
    rows = report_publication.gate_rows(report)
    table = _table(("gate", "#at most", "#found", "verdict"), rows) if rows else ""
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in report_publication.sentences(report))
    return _section("Publication", table + words) if table or words else ""


def _block_error(report: Mapping[str, Any]) -> str:
    blocks = report.get("blocks") or ()
    values = [block.get("relative_error") for block in blocks]
    if not any(is_number(value) for value in values):
        sentence = "Not measured: that takes evaluation text, which rides along through both models."
        return _section("Relative output error of each block", f"<p>{sentence}</p>")
    chart = svg.line_chart(
        [value if is_number(value) else None for value in values],
        _block_names(blocks),
        x_label="block",
        y_label="relative error",
    )
    sentence = (
        "How far the quantized stream has drifted from the original one behind each block, on held-out text."
    )
    return _plot_section("Relative output error of each block", sentence, chart)


def _kinds(report: Mapping[str, Any]) -> str:
    rows = figures.by_kind(report, "relative_error")
    top = figures.largest([figures.largest(values) for values in rows.values()])
    if top is None:
        return ""
    names = _block_names(report.get("blocks") or ())
    sentence = f"Relative output error of each linear on its calibration inputs, up to {number(top)}."
    return _plot_section("Error by kind of linear", sentence, svg.heat_map(rows, names, x_label="block"))


def _damping(report: Mapping[str, Any]) -> str:
    solved = [x for _, x in figures.linears(report) if is_number(x.get("damping_fraction"))]
    if not solved:
        return ""
    fractions = {linear["damping_fraction"] for linear in solved}
    attempts = max(linear.get("damping_attempts") or 1 for linear in solved)
    if len(fractions) == 1 and attempts == 1:
        sentence = (
            f"All {len(solved)} linears were solved at the first attempt with {number(fractions.pop())}"
        )
        return _section("Damping", f"<p>{sentence} of the mean diagonal.</p>")
    rows = figures.by_kind(report, "damping_fraction")
    names = _block_names(report.get("blocks") or ())
    sentence = (
        f"Share of the mean diagonal that was added before the factorization, {number(min(fractions))} to"
        f" {number(max(fractions))}; at most {attempts} attempts."
    )
    return _plot_section("Damping", sentence, svg.heat_map(rows, names, x_label="block"))


def _experts(report: Mapping[str, Any]) -> str:
    rows, sentence = report_experts.tokens_by_rank(report), report_experts.sentence(report)
    if sentence is None:
        return ""
    names = _block_names(report.get("blocks") or ())
    return _plot_section("Tokens of the experts", sentence, svg.heat_map(rows, names, x_label="block"))


def _stages(report: Mapping[str, Any]) -> str:
    stages = sorted((report.get("stages") or {}).items(), key=lambda item: -(item[1].get("seconds") or 0))
    top = max((stage.get("seconds") or 0 for _, stage in stages), default=0)
    bars = [
        (
            name,
            stage.get("seconds") or 0,
            f"{number(stage.get('seconds'), 3)} s, {number(stage.get('cpu_seconds'), 3)} CPU s,"
            f" {figures.count(stage.get('calls'))} calls",
        )
        for name, stage in stages
    ]
    sentence = "Summed over workers and calls; stages of different blocks overlap."
    return _section("Time in each stage", f'<p class="soft">{sentence}</p>{_bars(bars, top)}') if bars else ""


def _timeline(report: Mapping[str, Any]) -> str:
    workers = figures.part(report.get("timeline"), "workers")
    seconds = figures.part(report, "seconds")
    if not workers or not is_number(seconds) or seconds <= 0:
        return ""
    sentence = (
        "When each worker computed and when it moved bytes, from the start of the run; empty is waiting."
    )
    left_out = len(workers) - len(report_timeline.shown_workers(workers))
    if left_out:
        sentence += (
            f" {len(workers) - left_out} of {len(workers)} workers are shown, chosen evenly from the busiest"
            f" to the least busy; {left_out} are not."
        )
    shares = figures.lanes_sentence(report)
    below = f"<p>{escape(shares)}</p>" if shares else ""
    plot = report_timeline.timeline(workers, seconds)
    return _section(
        "Who waited for whom",
        f'<p class="soft">{escape(sentence)}</p>{report_timeline.legend(workers)}'
        f'<div class="wide">{plot}</div>{below}',
    )


def _memory(report: Mapping[str, Any]) -> str:
    peaks = figures.part(report.get("memory"), "worker_peak_memory_bytes") or ()
    planned = figures.planned_memory(report)
    bars = [(f"worker {i}", peak, figures.size(peak)) for i, peak in enumerate(peaks) if is_number(peak)]
    if planned:
        bars = [("planned", sum(planned.values()), figures.size(sum(planned.values()))), *bars]
    moved = report.get("bytes") or {}
    facts = _facts(
        {
            "read from storage": figures.size(moved.get("read")),
            "written to storage": figures.size(moved.get("written")),
            "planned for": ", ".join(f"{name} {figures.size(size)}" for name, size in planned.items()),
            "weights made only while a linear runs": _late_weights(report),
            "passes of the cells through a block": figures.count(
                figures.part(report.get("memory"), "most_slices")
            ),
        }
    )
    top = max((peak for _, peak, _ in bars), default=0)
    return _section("Peak memory and traffic", f"{_bars(bars, top)}<p></p>{facts}")


def _late_weights(report: Mapping[str, Any]) -> str | None:
    is_late = figures.part(figures.part(report.get("memory"), "planned"), "has_late_weights")
    return None if is_late is None else "yes" if is_late else "no"


def _fallbacks(report: Mapping[str, Any]) -> str:
    rows = [(x.get("linear"), x.get("kind"), x.get("detail")) for x in report.get("fallbacks") or ()]
    if not rows:
        return _section("Fallbacks", "<p>None.</p>")
    return _section("Fallbacks", _table(("linear", "kind", "detail"), rows))


def _worst(report: Mapping[str, Any]) -> str:
    rows = [
        (
            linear.get("name"),
            linear.get("method"),
            number(linear.get("relative_error")),
            number(linear.get("predicted_error")),
            number(linear.get("clipped_fraction")),
            number(linear.get("damping_fraction")),
            number(linear.get("bias_change")),
            number(linear.get("dead_columns")),
            number(linear.get("outlier_columns")),
            number(linear.get("kept_weights")),
            linear.get("fallback"),
        )
        for linear in figures.worst_linears(report, _LISTED)
    ]
    errors = ("#relative error", "#predicted", "#clipped")
    columns = ("#dead columns", "#outlier columns", "#weights kept")
    heads = ("linear", "method", *errors, "#damping", "#bias moved", *columns, "fallback")
    outliers = figures.outlier_sentence(report)
    below = f"<p>{escape(outliers)}</p>" if outliers else ""
    return _section("Linears with the largest error", _table(heads, rows) + below) if rows else ""


def _blocks(report: Mapping[str, Any]) -> str:
    rows = [
        (
            str(block.get("index")),
            number(block.get("relative_error")),
            number(block.get("cosine"), 6),
            number(figures.largest([_error(linear) for linear in block.get("linears") or ()])),
            number(figures.block_seconds(block), 3),
        )
        for block in report.get("blocks") or ()
    ]
    heads = ("block", "#relative error", "#cosine", "#worst linear", "#seconds")
    return _folded(f"All {len(rows)} blocks", _table(heads, rows)) if rows else ""


def _tensors(report: Mapping[str, Any]) -> str:
    rows = [
        (x.get("state"), x.get("count"), figures.size(x.get("size_bytes")), x.get("reason"), _listed(x))
        for x in report.get("tensors") or ()
    ]
    heads = ("state", "#tensors", "#size", "reason", "=names")
    total = sum(x.get("count") or 0 for x in report.get("tensors") or ())
    title = f"What became of the {total} tensors of the source"
    return _folded(title, _table(heads, rows)) if rows else ""


def _listed(account: Mapping[str, Any]) -> str:
    names = list(account.get("names") or ())
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join(names[:_LISTED] + more)


def _shards(report: Mapping[str, Any]) -> str:
    rows = [
        (x.get("name"), figures.size(x.get("size_bytes")), x.get("sha256"))
        for x in report.get("shards") or ()
    ]
    return _folded(f"{len(rows)} shards", _table(("shard", "#size", "=sha256"), rows)) if rows else ""


def _settings(report: Mapping[str, Any]) -> str:
    ran = (
        "identity",
        "model_type",
        "runner",
        "workers",
        "threads_per_worker",
        "device_kind",
        "compute_dtype",
        "tool",
    )
    facts = {name: report[name] for name in ran if name in report}
    calibration = report.get("calibration") or {}
    plain = {name: value for name, value in calibration.items() if name not in ("excluded_rows", "texts")}
    facts |= {f"calibration {name}": value for name, value in plain.items()}
    texts = [described(text) for text in calibration.get("texts") or ()]
    facts |= {"calibration text": "; ".join(texts)} if texts else {}
    parts = [_folded("Options", _facts(report.get("options") or {})), _folded("Run", _facts(facts))]
    parts.append(_folded("Versions", _facts(report.get("versions") or {})))
    if dropped := report.get("dropped"):
        table = _table(("tensor", "reason"), list(dropped.items()))
        parts.append(_folded(f"{len(dropped)} tensors of the source are not in the output", table))
    return "".join(parts)


def _error(linear: Mapping[str, Any]) -> float | None:
    value = linear.get("relative_error")
    return value if is_number(value) else None


def _block_names(blocks: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(block.get("index", position)) for position, block in enumerate(blocks)]


def _arrows(text: str) -> str:
    return " &rarr; ".join(f"<span>{escape(part)}</span>" for part in text.split(" -> "))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _plot_section(title: str, sentence: str, plot: str) -> str:
    return _section(title, f'<p class="soft">{escape(sentence)}</p><div class="wide">{plot}</div>')


def _folded(title: str, content: str) -> str:
    return f"<section><details><summary>{escape(title)}</summary>{content}</details></section>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>" for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _plain(value: Any) -> str:
    return figures.NOTHING if value is None else str(value)


def _bars(bars: Sequence[tuple[str, float, str]], top: float) -> str:
    rows = (
        f'<span>{escape(name)}</span>{svg.bar(value, top)}<span class="v">{escape(text)}</span>'
        for name, value, text in bars
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a head that begins with ``#`` stands over numbers, one with ``=`` over digests."""
    kinds = [_COLUMN_KINDS.get(head[:1], "") for head in heads]
    top = "".join(
        f"<th{kind}>{escape(head.lstrip('#='))}</th>" for kind, head in zip(kinds, heads, strict=True)
    )
    body = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Sequence[Any], kinds: Sequence[str]) -> str:
    pairs = zip(kinds, row, strict=True)
    return "".join(f"<td{kind}>{escape(_plain(value))}</td>" for kind, value in pairs)
