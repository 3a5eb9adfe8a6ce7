"""The report of a run: what was done to every linear, what it cost, and what it was worth.

``quantmill_report.json`` beside the output; the HTML and the terminal view are drawn from the same values.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from quantlib.job.manifest import DoneRecord
from quantlib.job.plan import Plan

SCHEMA = 1
REPORT_NAME = "quantmill_report.json"
HTML_NAME = "quantmill_report.html"


def build_report(
    *,
    plan: Plan,
    records: Mapping[str, DoneRecord],
    resumed: Sequence[str],
    figures: Sequence[Mapping[str, float]] | None,
    block_errors: Mapping[int, Mapping[str, Any]],
    block_seconds: Mapping[int, Mapping[str, float]],
    excluded_rows: Sequence[int],
    telemetry: Sequence[Mapping[str, Any]],
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    """Put a finished run into JSON values.

    Units: seconds are wall seconds, ``cpu_seconds`` user + system of the worker processes, bytes are bytes,
    ``kl_divergence`` is nats a token (original against quantized).
    """
    linears = {unit: record.linears for unit, record in records.items()}
    read = sum(worker["bytes_read"] for worker in telemetry)
    written = sum(worker["bytes_written"] for worker in telemetry)
    return {
        "schema": SCHEMA,
        "tool": f"quantmill {plan.versions['quantmill']}",
        "identity": plan.identity(),
        "source": plan.source,
        "output": plan.output,
        "model_type": plan.model_type,
        "options": dict(plan.options),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "resumed_units": list(resumed),
        "workers": len(telemetry),
        "threads_per_worker": plan.threads,
        "device_kind": plan.device_kind,
        "compute_dtype": plan.compute_dtype,
        "runner": plan.options["runner"],
        "evaluation": _evaluation(plan, figures),
        "calibration": _calibration(plan, excluded_rows),
        "blocks": [
            {
                "index": block.index,
                "relative_error": block_errors.get(block.index, {}).get("relative_error"),
                "cosine": block_errors.get(block.index, {}).get("cosine"),
                "linears": [dict(row) for row in linears[plan.block_units[block.index].name]],
                "seconds": dict(block_seconds.get(block.index, {})),
            }
            for block in plan.blocks
        ],
        "shards": [
            {
                "name": unit.shard,
                "sha256": records[unit.name].sha256,
                "size_bytes": records[unit.name].size_bytes,
            }
            for unit in plan.units
        ],
        "bytes": {
            "source": sum(
                size for name, (size, _) in plan.source_objects.items() if name.endswith(".safetensors")
            ),
            "output": sum(records[unit.name].size_bytes for unit in plan.units),
            "read": read,
            "written": written,
        },
        "stages": _stages(telemetry),
        "cpu_seconds": sum(worker["cpu_seconds"] for worker in telemetry),
        "memory": {"worker_peak_rss_bytes": [worker["peak_rss_bytes"] for worker in telemetry]},
        "fallbacks": [
            {"linear": row["name"], "kind": row["fallback"], "detail": f"{row['tokens']} tokens"}
            for rows in linears.values()
            for row in rows
            if row["fallback"]
        ],
        "dropped": dict(plan.dropped),
        "versions": dict(plan.versions),
    }


def _evaluation(plan: Plan, figures: Sequence[Mapping[str, float]] | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    tokens = sum(cell["tokens"] for cell in figures)
    nll_original = sum(cell["nll_original"] for cell in figures) / tokens
    nll_quantized = sum(cell["nll_quantized"] for cell in figures) / tokens
    return {
        "sequences": int(sum(cell["sequences"] for cell in figures)),
        "tokens": int(tokens),
        "digest": plan.evaluation_digest,
        "perplexity_original": math.exp(nll_original),
        "perplexity_quantized": math.exp(nll_quantized),
        "ratio": math.exp(nll_quantized - nll_original),
        "kl_divergence": sum(cell["kl_divergence"] for cell in figures) / tokens,
    }


def _calibration(plan: Plan, excluded_rows: Sequence[int]) -> dict[str, Any] | None:
    if plan.calibration_digest is None:
        return None
    sequences = plan.options["sequences"]
    return {
        "sequences": sequences,
        "tokens": (sequences - len(excluded_rows)) * plan.options["sequence_length"],
        "digest": plan.calibration_digest,
        "excluded_rows": list(excluded_rows),
    }


def _stages(telemetry: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    stages: dict[str, dict[str, float]] = {}
    for worker in telemetry:
        for name, spent in worker["stages"].items():
            total = stages.setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0})
            for key in total:
                total[key] += spent[key]
    return stages
