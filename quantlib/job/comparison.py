"""Schemes and methods side by side: one row an output, from the reports of a comparison.

Every figure is that of the output's own report. Rows whose outputs were made from one reading share all but
what was computed for one of them alone; of that only the solving is told.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantlib.job.comparison_request import ComparisonRequest, departs_from_default
from quantlib.job.report_figures import part
from quantlib.job.scheme_entries import SchemeEntry
from quantlib.storage.uris import normalize_uri

SCHEMA = 1
_FIGURES = {"perplexity": "perplexity_quantized", "ratio": "ratio", "kl_divergence": "kl_divergence"}


def build_comparison(request: ComparisonRequest, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the reports of a comparison's outputs, in the order of its entries, into JSON values.

    Units: ``bits_per_weight`` are all bytes that stand for the weights of quantized linears (codes, scales,
    zero points, and what else the format wants) over those weights; ``size_bytes`` is the whole output and
    ``share`` that over the source as it is stored; ``kl_divergence`` is nats a token; ``solve_seconds`` are
    wall seconds of workers, added up; ``seconds`` are the wall seconds of all ``readings`` of the source.

    ``format`` names the layouts of all outputs. Figures are None where a report has none, and ``notes`` say
    why. ``output`` is None where nothing is kept.
    """
    first = reports[0]
    readings = {tuple(sorted((r["output"], *r["made_with"]))): r["seconds"] for r in reports}
    return {
        "schema": SCHEMA,
        "tool": first["tool"],
        "source": first["source"],
        "source_format": first["source_format"],
        "model_type": first["model_type"],
        "format": ", ".join(dict.fromkeys(report["options"]["format"] for report in reports)),
        "source_bytes": first["bytes"]["source"],
        "evaluation": _evaluation(reports),
        "calibration_tokens": next((r["calibration"]["tokens"] for r in reports if r["calibration"]), None),
        "readings": len(readings),
        "seconds": sum(readings.values()),
        "workers": first["workers"],
        "output": None if request.output is None else normalize_uri(request.output),
        "device_kind": first["device_kind"],
        "rows": [
            _row(entry, report, is_kept=request.output is not None)
            for entry, report in zip(request.entries, reports, strict=True)
        ],
        "notes": list(_notes(request, reports)),
    }


def _evaluation(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the source; any output's report has it whose own figures are there."""
    found = [report["evaluation"] for report in reports]
    best = next((values for values in found if values["perplexity_original"] is not None), found[0])
    return {
        "perplexity": best["perplexity_original"],
        **{name: best[name] for name in ("sequences", "tokens", "digest", "texts")},
    }


def _row(entry: SchemeEntry, report: Mapping[str, Any], *, is_kept: bool) -> dict[str, Any]:
    quantized, sizes = report.get("quantized"), report["bytes"]
    weights = part(quantized, "weights")
    return {
        "entry": str(entry),
        "method": entry.method,
        "scheme": entry.scheme,
        "group_size": entry.group_size,
        "bits_per_weight": None if not quantized or not weights else 8 * quantized["size_bytes"] / weights,
        "size_bytes": sizes["output"],
        "share": sizes["output"] / sizes["source"],
        **{name: report["evaluation"][stored] for name, stored in _FIGURES.items()},
        "solve_seconds": part(part(report.get("own_stages"), "solve"), "seconds"),
        "fallbacks": len(report["fallbacks"]),
        "output": report["output"] if is_kept else None,
    }


def _notes(request: ComparisonRequest, reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader must know before trusting the rows."""
    pairs = zip(request.entries, request.conversions, strict=True)
    departed = [str(entry) for entry, options in pairs if departs_from_default(options)]
    if departed:
        yield (
            f"{', '.join(departed)}: calibrated on original activations, as one reading needs; a conversion"
            " by itself would choose those of quantized blocks"
        )
    for entry, report in zip(request.entries, reports, strict=True):
        if reason := part(report["evaluation"], "no_figures_because"):
            yield f"{entry}: no figures, as {reason}"
        for kind, times in Counter(found["kind"] for found in report["fallbacks"]).items():
            yield f"{entry}: {times} linears with a fallback, {kind}"
        if reused := report["history"].get("reused_units"):
            yield f"{entry}: {len(reused)} units are of an earlier start, whose seconds are not counted"
    excluded = {row for report in reports for row in part(report["calibration"], "excluded_rows") or ()}
    if excluded:
        yield f"{len(excluded)} calibration rows gave activations that are not finite, and were left out"
