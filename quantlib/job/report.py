"""The report of a run: what was done to every linear, what it cost, and what it was worth.

``quantmill_report.json`` beside the output; the HTML and the terminal view are drawn from the same values.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from quantlib.checkpoint.index import WEIGHT_FILES
from quantlib.checkpoint.layout import spec_bytes
from quantlib.job.manifest import DoneRecord
from quantlib.job.plan import Plan
from quantlib.job.report_figures import LANES, busy_share, hidden_storage_share

SCHEMA = 1
REPORT_NAME = "quantmill_report.json"
HTML_NAME = "quantmill_report.html"

_LOSSES = ("nll_original", "nll_quantized", "kl_divergence")


def build_report(
    *,
    plan: Plan,
    memory: Mapping[str, Any],
    records: Mapping[str, DoneRecord],
    history: Mapping[str, Any],
    figures: Sequence[Mapping[str, float]] | None,
    block_errors: Mapping[int, Mapping[str, Any]],
    block_seconds: Mapping[int, Mapping[str, float]],
    excluded_rows: Sequence[int],
    telemetry: Sequence[Mapping[str, Any]],
    number: int,
    made_with: Sequence[str],
    packed_with: Sequence[str],
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    """Put a finished run into JSON values.

    Units: seconds are wall seconds, ``cpu_seconds`` user + system of the worker processes, bytes are bytes,
    ``kl_divergence`` is nats a token (original against quantized); ``history`` is a
    `quantlib.job.history.History`. ``device_kind`` is the plan's, ``device_kinds`` are those that took part.
    ``made_with`` are outputs made from the same reading: seconds, traffic and memory are those of all, but
    ``own_stages`` are those of the output with this ``number`` among them. ``quantized`` has the ``weights``
    of quantized linears and ``size_bytes`` of the tensors that stand for them: codes, scales and whatever
    else the format wants, without biases. ``packed_with`` are those among ``made_with`` that have the same
    codes: they were solved once, which is in the ``own_stages`` of one of them. ``publication`` is for
    `quantlib.job.publishing` to fill in: what the output was held to, and what came of it. ``memory.steps``
    counts the linears of a `quantlib.methods.contracts.LinearReport.memory_step`. ``cholesky_checks`` has of
    every worker a `quantlib.cholesky_check.CholeskyCheck`, None where none was made.

    ``timeline.workers`` holds for every worker the second it ``began`` and for each of its lanes the
    [stage, start, end] of what it did, to the millisecond and in seconds from ``started``: planning comes
    before it and is negative. Workers that were lost are not there, and what comes after the report, its
    publication, is in no lane.
    """
    linears = {unit: record.linears for unit, record in records.items()}
    read = sum(worker["bytes_read"] for worker in telemetry)
    written = sum(worker["bytes_written"] for worker in telemetry)
    return {
        "schema": SCHEMA,
        "tool": f"quantmill {plan.versions['quantmill']}",
        "identity": plan.identity(),
        "source": plan.source,
        "source_format": plan.source_format,
        "output": plan.output,
        "made_with": list(made_with),
        "packed_with": list(packed_with),
        "model_type": plan.model_type,
        "options": dict(plan.options),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "history": dict(history),
        "workers": len(telemetry),
        "threads_per_worker": plan.threads,
        "device_kind": plan.device_kind,
        "device_kinds": sorted({kind for worker in telemetry for kind in worker["device_kinds"]}),
        "compute_dtype": plan.compute_dtype,
        "runner": plan.options["runner"],
        "evaluation": _evaluation(plan, figures),
        "calibration": _calibration(plan, excluded_rows),
        "blocks": _blocks(plan, records, block_errors, block_seconds),
        "shards": [
            {"name": u.shard, "sha256": records[u.name].sha256, "size_bytes": records[u.name].size_bytes}
            for u in plan.units
        ],
        "bytes": {
            "source": sum(
                size for name, (size, _) in plan.source_objects.items() if name.endswith(WEIGHT_FILES)
            ),
            "output": sum(records[unit.name].size_bytes for unit in plan.units),
            "read": read,
            "written": written,
        },
        "quantized": _quantized(plan),
        "stages": _added(worker["stages"] for worker in telemetry),
        "own_stages": _added(
            worker["own_stages"].get(number, {}) if made_with else worker["stages"] for worker in telemetry
        ),
        "timeline": _timeline(telemetry, started, seconds),
        "cpu_seconds": sum(worker["cpu_seconds"] for worker in telemetry),
        "memory": _memory(memory, telemetry, linears),
        "cholesky_checks": [worker["cholesky_check"] for worker in telemetry],
        "fallbacks": [
            {"linear": row["name"], "kind": row["fallback"], "detail": f"{row['tokens']} tokens"}
            for rows in linears.values()
            for row in rows
            if row["fallback"]
        ],
        "tensors": [dataclasses.asdict(account) for account in plan.accounts],
        "dropped": dict(plan.dropped),
        "versions": dict(plan.versions),
        "publication": {"state": "staged", "gates": [], "hook": None},
    }


def _blocks(
    plan: Plan,
    records: Mapping[str, DoneRecord],
    errors: Mapping[int, Mapping[str, Any]],
    seconds: Mapping[int, Mapping[str, float]],
) -> list[dict[str, Any]]:
    return [
        block_row(
            block.index,
            records[unit.name].linears,
            errors.get(block.index, {}),
            {**records[unit.name].seconds, **seconds.get(block.index, {})},
        )
        for block in plan.blocks
        for unit in (plan.block_units[block.index],)
    ]


def block_row(
    index: int,
    linears: Iterable[Mapping[str, Any]],
    errors: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What is known of a block: an entry of ``blocks`` of the report.

    Args:
        linears: Rows of its linears.
        errors: ``relative_error`` and ``cosine`` of its quantized stream, where they were measured.
        seconds: Stage -> seconds.
    """
    return {
        "index": index,
        "relative_error": errors.get("relative_error"),
        "cosine": errors.get("cosine"),
        "linears": [dict(row) for row in linears],
        "seconds": dict(seconds),
    }


def _evaluation(plan: Plan, figures: Sequence[Mapping[str, float]] | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    sums = {name: sum(cell[name] for cell in figures) for name in figures[0]}
    counts = {
        "sequences": int(sums["sequences"]),
        "excluded_sequences": int(sums["excluded_sequences"]),
        "tokens": int(sums["tokens"]),
        "digest": plan.evaluation_digest,
        "texts": [dataclasses.asdict(text) for text in plan.evaluation_texts],
    }
    losses = {name: sums[name] / max(1.0, sums["tokens"]) for name in _LOSSES}
    reason = _no_figures_because(counts, losses)
    if reason:
        empty = ("perplexity_original", "perplexity_quantized", "ratio", "kl_divergence")
        return {**counts, **dict.fromkeys(empty), "no_figures_because": reason}
    return {
        **counts,
        "perplexity_original": math.exp(losses["nll_original"]),
        "perplexity_quantized": math.exp(losses["nll_quantized"]),
        "ratio": math.exp(losses["nll_quantized"] - losses["nll_original"]),
        "kl_divergence": losses["kl_divergence"],
    }


def _no_figures_because(counts: Mapping[str, Any], losses: Mapping[str, float]) -> str | None:
    if not counts["tokens"]:
        return "every evaluation row gives non-finite activations in the original model"
    for name, loss in losses.items():
        # exp leaves fp64 above 709; JSON has no words for what lies there.
        if not math.isfinite(loss) or loss > 700:
            return f"{name} is {loss} nats a token: the model is broken"
    return None


def _calibration(plan: Plan, excluded_rows: Sequence[int]) -> dict[str, Any] | None:
    if plan.calibration_digest is None:
        return None
    sequences = plan.options["sequences"]
    return {
        "sequences": sequences,
        "tokens": (sequences - len(excluded_rows)) * plan.options["sequence_length"],
        "digest": plan.calibration_digest,
        "texts": [dataclasses.asdict(text) for text in plan.calibration_texts],
        "excluded_rows": list(excluded_rows),
    }


def _memory(
    planned: Mapping[str, Any],
    telemetry: Sequence[Mapping[str, Any]],
    linears: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What was planned beside what every worker took at most, and where it did not suffice."""
    named = ("pipelines", "has_late_weights", "worker", "device", "store", "unsliced_bytes")
    measured = ("peak_memory_bytes", "peak_device_bytes", "waiting_on_disk_bytes")
    # Rows of units that an earlier release finished have no step.
    steps = Counter(step for rows in linears.values() for row in rows if (step := row.get("memory_step")))
    return {
        "planned": {name: planned[name] for name in named},
        "most_slices": max((len(passes) for passes in planned["slices"]), default=1),
        **{f"worker_{name}": [worker[name] for worker in telemetry] for name in measured},
        "steps": dict(sorted(steps.items())),
    }


def _quantized(plan: Plan) -> dict[str, int]:
    units, weights, size_bytes = plan.block_units, 0, 0
    for block in plan.blocks:
        linears = {linear.name: linear for linear in block.linears if linear.scheme is not None}
        weights += sum(linear.rows * linear.columns for linear in linears.values())
        for spec in units[block.index].tensors:
            size_bytes += spec_bytes(spec) if _is_part(spec.name, linears) else 0
    return {"weights": weights, "size_bytes": size_bytes}


def _is_part(name: str, linears: Container[str]) -> bool:
    """Whether a tensor stands for the weight of one of the linears; some have names of several parts."""
    module, _, last = name.rpartition(".")
    if module in linears:
        return last != "bias"
    return bool(module) and _is_part(module, linears)


def _added(tables: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    stages: dict[str, dict[str, float]] = {}
    for table in tables:
        for name, spent in table.items():
            total = stages.setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0})
            for key in total:
                total[key] += spent[key]
    return stages


def _timeline(telemetry: Sequence[Mapping[str, Any]], started: datetime, seconds: float) -> dict[str, Any]:
    zero = started.timestamp()
    workers = []
    for worker in telemetry:
        seen = worker["timeline"]
        lanes = {
            lane: [[stage, round(start - zero, 3), round(end - zero, 3)] for stage, start, end in seen[lane]]
            for lane in LANES
        }
        workers.append({"began": round(seen["began"] - zero, 3), **lanes})
    return {
        "workers": workers,
        "busy_share": busy_share(workers, seconds),
        "hidden_storage_share": hidden_storage_share(workers, seconds),
    }
