"""What the two views of a report have in common: figures drawn from it, and how numbers are written.

A report is the JSON of ``quantmill_report.json``. Parts of it may be missing (no evaluation text, no
calibration, one that an older version wrote), so every function here takes what is there and says ``None`` or
``-`` where nothing is.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.schemes import groups_said

NOTHING = "-"
LANES = ("compute", "storage")
# What `source_format` says of weights that are no codes.
_PLAIN = "safetensors"
# What `LinearReport.memory_step` says.
_MEMORY_STEPS = {
    "emptied_cache": "once more",
    "smaller_tiles": "in smaller tiles",
    "cpu": "on the CPU",
}
_BLOCK_PREFIX = re.compile(r"^.*?\.\d+\.")
_REPEATED_MODULE = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure of the verdict.

    Attributes:
        name: What it is about.
        value: The figure as text, ``before -> after`` where there are two.
        note: The comparison or reservation that belongs to it.
    """

    name: str
    value: str
    note: str


def headlines(report: Mapping[str, Any]) -> tuple[Headline, ...]:
    """The verdict of a run: perplexity, divergence, size and time, in this order."""
    return (*_quality(report), _size(report), _time(report))


def _quality(report: Mapping[str, Any]) -> Iterator[Headline]:
    evaluation = report.get("evaluation")
    before, after = part(evaluation, "perplexity_original"), part(evaluation, "perplexity_quantized")
    if before is None or after is None:
        reason = part(evaluation, "no_figures_because") or "no evaluation text was given"
        yield Headline(name="Perplexity", value="not measured", note=reason)
        return
    ratio = part(evaluation, "ratio") or after / before
    tokens = f"{count(part(evaluation, 'tokens'))} held-out tokens"
    yield Headline(
        name="Perplexity",
        value=f"{before:.3f} -> {after:.3f}",
        note=f"x {ratio:.4f} ({100 * (ratio - 1):+.1f} %) on {tokens}",
    )
    divergence = part(evaluation, "kl_divergence")
    if divergence is not None:
        yield Headline(name="KL divergence", value=number(divergence), note="nats per token")


def _size(report: Mapping[str, Any]) -> Headline:
    source, output = part(report.get("bytes"), "source"), part(report.get("bytes"), "output")
    if not source or not output:
        return Headline(name="Size", value="not recorded", note="")
    note = _comparison(source, output, report.get("source_format") or _PLAIN)
    return Headline(name="Size", value=f"{size(source)} -> {size(output)}", note=note)


def _comparison(source: int, output: int, source_format: str) -> str:
    factor = max(source, output) / min(source, output)
    if factor < 1.005:
        return "about the same size"
    if output < source:
        return f"{factor:.2f} times smaller"
    # Codes can be smaller than the output: of tensors that are kept the levels are written.
    why = "" if source_format == _PLAIN else f"; the source is stored as {source_format}"
    return f"{factor:.2f} times as large{why}"


def _time(report: Mapping[str, Any]) -> Headline:
    cpu_seconds = report.get("cpu_seconds")
    workers = report.get("workers")
    parts = [] if cpu_seconds is None else [f"{number(cpu_seconds)} CPU seconds"]
    hours = gpu_hours(report)
    if hours is not None:
        parts.insert(0, f"{number(hours, 3)} GPU-hours")
    if workers is not None:
        parts.append(f"{workers} worker{'' if workers == 1 else 's'}")
    return Headline(name="Time", value=duration(report.get("seconds")), note=", ".join(parts))


def model_name(report: Mapping[str, Any]) -> str:
    """The last part of the source's address."""
    return str(report.get("source", "")).rstrip("/").rpartition("/")[2] or "model"


def request(report: Mapping[str, Any]) -> str:
    """Scheme, group size, method, columns or weights kept and format in a few words."""
    options = report.get("options") or {}
    group_size = options.get("group_size")
    columns, weights = options.get("outlier_columns"), options.get("outlier_weights")
    words = (
        options.get("scheme"),
        None if group_size is None else groups_said(group_size),
        options.get("method"),
        f"{columns} outlier columns" if columns else None,
        f"{weights} of 1,000 weights kept" if weights else None,
        options.get("format"),
    )
    return ", ".join(str(word) for word in words if word)


def linears(report: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every (block index, linear entry) of the report."""
    for block in report.get("blocks") or ():
        for linear in block.get("linears") or ():
            yield block.get("index", 0), linear


def outlier_sentence(report: Mapping[str, Any]) -> str | None:
    """In how many linears inputs were far larger than others; None where no tokens were seen.

    >>> linears = [{"name": "a", "outlier_columns": 3}, {"name": "b", "outlier_columns": 0}]
    >>> outlier_sentence({"blocks": [{"linears": linears}]})
    'Inputs of a magnitude of 6 or more: in 1 of 2 linears, in at most 3 columns of one (a).'
    """
    found = [x for _, x in linears(report) if is_number(x.get("outlier_columns"))]
    if not found:
        return None
    with_some = [x for x in found if x["outlier_columns"]]
    if not with_some:
        return f"No linear of {count(len(found))} had an input of a magnitude of 6 or more."
    most = max(with_some, key=lambda x: x["outlier_columns"])
    return (
        f"Inputs of a magnitude of 6 or more: in {count(len(with_some))} of {count(len(found))} linears,"
        f" in at most {count(most['outlier_columns'])} columns of one ({most.get('name')})."
    )


def linear_kind(name: str) -> str:
    """The name of a linear without its block, repeated modules (experts) taken together.

    >>> linear_kind("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
    >>> linear_kind("model.layers.3.mlp.experts.17.up_proj")
    'mlp.experts.*.up_proj'
    """
    return _REPEATED_MODULE.sub("*", _BLOCK_PREFIX.sub("", name, count=1))


def by_kind(report: Mapping[str, Any], field: str) -> dict[str, list[float | None]]:
    """Kind of linear -> one value a block: the largest ``field`` of its linears, None where there is none.

    Blocks stand in the order of the report; kinds in the order in which they first appear.
    """
    blocks: Sequence[Mapping[str, Any]] = report.get("blocks") or ()
    found: dict[str, list[float | None]] = {}
    for position, block in enumerate(blocks):
        for linear in block.get("linears") or ():
            values = found.setdefault(linear_kind(str(linear.get("name", ""))), [None] * len(blocks))
            value, known = linear.get(field), values[position]
            if is_number(value) and (known is None or value > known):
                values[position] = value
    return found


def worst_linears(report: Mapping[str, Any], limit: int) -> list[Mapping[str, Any]]:
    """The linears with the largest relative error, largest first."""
    measured = [linear for _, linear in linears(report) if is_number(linear.get("relative_error"))]
    return sorted(measured, key=lambda linear: -linear["relative_error"])[:limit]


def block_seconds(block: Mapping[str, Any]) -> float:
    """Seconds of all stages of a block, which may have overlapped with those of another block."""
    return sum(seconds for seconds in (block.get("seconds") or {}).values() if is_number(seconds))


def busy_share(workers: Sequence[Mapping[str, Any]], seconds: float) -> float | None:
    """Share of the workers' time in which their compute lanes were busy; None where they had no time.

    A worker's time goes from the run's start, or its own where that is later, to the run's end.

    Args:
        workers: ``timeline.workers`` of a report.
        seconds: How long the run took.
    """
    busy = sum(_seconds_of(_busy_spans(worker, "compute", seconds)) for worker in workers)
    there = _seconds_there(workers, seconds)
    return busy / there if there > 0 else None


def gpu_hours(report: Mapping[str, Any]) -> float | None:
    """Hours that GPUs were held, busy or not; None where none took part.

    A worker has one GPU, from the run's start or its own to the run's end. Those of lost workers are not
    known.
    """
    workers, seconds = part(report.get("timeline"), "workers"), report.get("seconds")
    if seconds is None or not workers or not str(report.get("device_kind", "")).startswith("cuda"):
        return None
    return _seconds_there(workers, seconds) / 3600


def machine_hours(report: Mapping[str, Any]) -> str | None:
    """What a run cost: GPU-hours where it ran on GPUs, else CPU-hours; None where neither is known."""
    hours, cpu_seconds = gpu_hours(report), report.get("cpu_seconds")
    if hours is not None:
        return f"{number(hours, 3)} GPU-hours"
    return None if cpu_seconds is None else f"{number(cpu_seconds / 3600, 3)} CPU-hours"


def _seconds_there(workers: Sequence[Mapping[str, Any]], seconds: float) -> float:
    return sum(max(0.0, seconds - _own_start(worker)) for worker in workers)


def hidden_storage_share(workers: Sequence[Mapping[str, Any]], seconds: float) -> float | None:
    """Share of the time of storage lanes in which the same worker was computing; None without storage.

    Args:
        workers: ``timeline.workers`` of a report.
        seconds: How long the run took.
    """
    hidden = storage = 0.0
    for worker in workers:
        computing, moving = (_busy_spans(worker, lane, seconds) for lane in LANES)
        storage += _seconds_of(moving)
        hidden += _seconds_of(_common_spans(computing, moving))
    return hidden / storage if storage > 0 else None


def _own_start(worker: Mapping[str, Any]) -> float:
    return max(0.0, worker["began"])


def _busy_spans(worker: Mapping[str, Any], lane: str, seconds: float) -> list[tuple[float, float]]:
    """When a lane did anything within its worker's time: spans that do not touch, in order."""
    since = _own_start(worker)
    spans: list[tuple[float, float]] = []
    for start, end in sorted((max(start, since), min(end, seconds)) for _, start, end in worker[lane]):
        if end <= start:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def _common_spans(
    some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """What two lists of spans, each in order and without overlap, have in common."""
    one = two = 0
    while one < len(some) and two < len(others):
        start, end = max(some[one][0], others[two][0]), min(some[one][1], others[two][1])
        if start < end:
            yield start, end
        if some[one][1] < others[two][1]:
            one += 1
        else:
            two += 1


def _seconds_of(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def lanes_sentence(report: Mapping[str, Any]) -> str | None:
    """How busy the compute lanes were and what storage cost beside them; None where no timeline tells."""
    timeline = report.get("timeline")
    busy, hidden = part(timeline, "busy_share"), part(timeline, "hidden_storage_share")
    if not is_number(busy):
        return None
    sentence = f"Compute lanes were busy {percent(busy)} of the time"
    if not is_number(hidden):
        return f"{sentence}."
    return f"{sentence}; {percent(hidden)} of the time spent on storage was hidden behind computation."


def part(mapping: Mapping[str, Any] | None, name: str) -> Any:
    """``mapping[name]``, or None where either is missing."""
    return None if mapping is None else mapping.get(name)


def planned_memory(report: Mapping[str, Any]) -> dict[str, int]:
    """Purpose -> bytes of a worker when it needs most, as planned; empty where nothing was planned."""
    planned = part(part(report.get("memory"), "planned"), "worker") or {}
    return {name: size for name, size in planned.items() if is_number(size) and size > 0}


def is_number(value: object) -> bool:
    """True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits.

    >>> number(0.059712), number(338.04), number(None)
    ('0.05971', '338', '-')
    """
    return f"{value:.{digits}g}" if is_number(value) else NOTHING


def count(value: Any) -> str:
    """A whole number with its thousands apart.

    >>> count(16352)
    '16,352'
    """
    return f"{value:,}" if is_number(value) else NOTHING


def size(num_bytes: Any) -> str:
    """A number of bytes in the decimal unit that fits.

    >>> size(269030016), size(812), size(None)
    ('269.0 MB', '812 B', '-')
    """
    if not is_number(num_bytes):
        return NOTHING
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if abs(num_bytes) >= 1000**exponent:
            return f"{num_bytes / 1000**exponent:.1f} {unit}"
    return f"{num_bytes} B"


def duration(seconds: Any) -> str:
    """Seconds as a person says them.

    >>> duration(8.25), duration(252), duration(7380)
    ('8.2 s', '4 min 12 s', '2 h 03 min')
    """
    if not is_number(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A part of one as percent.

    >>> percent(0.8341), percent(0.002), percent(1.0)
    ('83.4 %', '0.2 %', '100 %')
    """
    return f"{number(100 * share, 3)} %"


def largest(values: Sequence[float | None]) -> float | None:
    """The largest value that is one, None where there is none."""
    return max((value for value in values if value is not None), default=None)


def history_sentences(report: Mapping[str, Any]) -> list[str]:
    """What a run was not alone in, took over, and what went wrong on the way, a sentence each; else empty."""
    history = report.get("history") or {}
    found = []
    if others := report.get("made_with"):
        names = ", ".join(uri.rstrip("/").rpartition("/")[2] for uri in others)
        found.append(f"Made from one reading with {names}: time, traffic and memory are those of all")
    if others := report.get("packed_with"):
        names = ", ".join(uri.rstrip("/").rpartition("/")[2] for uri in others)
        found.append(f"Has the codes of {names}, which were solved once")
    if reused := history.get("reused_units"):
        found.append(f"Found finished from an earlier start and intact: {len(reused)} units")
    for unit, reason in (history.get("redone_units") or {}).items():
        found.append(f"Done again: {unit}, because {reason}")
    if history.get("from_checkpoint"):
        found.append(
            f"Taken up from a checkpoint of the activations before block {history['from_checkpoint']}"
        )
    if replayed := history.get("replayed_blocks"):
        found.append(f"Activations run again through finished blocks: {len(replayed)}")
    found += [
        f"A checkpoint could not be used: {reason}" for reason in history.get("unusable_checkpoints", ())
    ]
    for stage, times in (history.get("retries") or {}).items():
        found.append(f"Tried again: {stage}, {times} times")
    for renewal in history.get("renewals", ()):
        how = "It went on with the workers left" if renewal.get("keeps_others") else "Workers started anew"
        found.append(f"{how} ({renewal['workers']} of them): {renewal['because']}")
    if joined := history.get("joined_workers"):
        found.append(f"Workers that came while the job ran: {joined}")
    found += [f"A worker that came was of no use: {reason}" for reason in history.get("refused_workers", ())]
    if moved := history.get("moved_cells"):
        found.append(f"Cells that a worker with nothing to do took over from a busy one: {moved}")
    if len(kinds := report.get("device_kinds") or ()) > 1:
        found.append(f"Several kinds of device took part, and the bytes depend on it: {', '.join(kinds)}")
    if exchanges := {way: n for way, n in (history.get("exchanges") or {}).items() if way != "direct"}:
        ways = ", ".join(f"{way} {times}" for way, times in sorted(exchanges.items()))
        found.append(f"Statistics of workers were added up before they were used, slices of blocks: {ways}")
    found += [
        f"Statistics went from node to node through the object store: {reason}"
        for reason in history.get("exchange_fallbacks", ())
    ]
    found += _device_sentences(report)
    if history.get("renewals"):
        found.append("What lost workers spent and moved is not in the figures: CPU seconds, bytes, memory")
    if aborted := history.get("aborted_uploads"):
        found.append(f"Unfinished uploads of processes that died, given up: {aborted}")
    return found


def _device_sentences(report: Mapping[str, Any]) -> Iterator[str]:
    for step, linears in (part(report.get("memory"), "steps") or {}).items():
        how = _MEMORY_STEPS.get(step, step)
        yield f"Memory of a device did not suffice for linears that were solved {how}: {count(linears)}"
    for worker, check in enumerate(report.get("cholesky_checks") or ()):
        for way, problem in (part(check, "problems") or {}).items():
            yield (
                f"Worker {worker} made factors in the way {check['way']}, as {way} failed at"
                f" {count(check['columns'])} columns: {problem}"
            )
