"""What a report comes to in one sentence, and what speaks against trusting it."""

from collections.abc import Iterator, Mapping
from typing import Any

from quantlib.job.block_figures import fallback_words
from quantlib.job.report_figures import (
    count,
    is_number,
    machine_hours,
    number,
    part,
    size,
)

# A round number and no law: small models at 4 bits stay below it, large ones far below.
MAX_GOOD_RATIO = 1.1


def concerns(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the output, a sentence each.

    What went wrong on the way and was made good is not among them: see `history_sentences`.
    """
    return list(_concerns(report))


def _concerns(report: Mapping[str, Any]) -> Iterator[str]:
    evaluation = report.get("evaluation")
    if reason := part(evaluation, "no_figures_because"):
        yield f"The evaluation gave no figures: {reason}"
    ratio = part(evaluation, "ratio")
    if is_number(ratio) and ratio > MAX_GOOD_RATIO:
        yield f"Perplexity grew to {number(ratio)} times what it was"
    if fallbacks := report.get("fallbacks"):
        kinds = sorted(str(fallback["kind"]) for fallback in fallbacks)
        words = fallback_words({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})
        yield f"Fallbacks: {len(fallbacks)} ({words})"
    if excluded := part(report.get("calibration"), "excluded_rows"):
        rows = ", ".join(str(row) for row in excluded)
        yield f"Calibration rows excluded for non-finite activations: {len(excluded)} ({rows})"
    if excluded := part(evaluation, "excluded_sequences"):
        yield f"Evaluation rows excluded for non-finite activations: {count(excluded)}"


def verdict(report: Mapping[str, Any]) -> str:
    """The run in one sentence: good, to be looked at, or not measured; quality, size and what it cost.

    Good is an output with held-out figures against which no concern speaks.

    >>> verdict({"evaluation": {"perplexity_original": 8.0, "perplexity_quantized": 8.2, "ratio": 1.025},
    ...          "bytes": {"source": 4000, "output": 1000}, "cpu_seconds": 7200})
    'Good: perplexity 8.000 -> 8.200 (+2.5 %), 4.0 kB -> 1.0 kB, 2 CPU-hours.'
    """
    return f"{_word(report)}: {', '.join(_facts(report)) or 'no figures'}."


def _word(report: Mapping[str, Any]) -> str:
    found = concerns(report)
    if found:
        return f"Look at it, {len(found)} concern{'' if len(found) == 1 else 's'}"
    is_measured = part(report.get("evaluation"), "perplexity_quantized") is not None
    return "Good" if is_measured else "Not measured, as no evaluation text was given"


def _facts(report: Mapping[str, Any]) -> Iterator[str]:
    evaluation = report.get("evaluation")
    before, after = part(evaluation, "perplexity_original"), part(evaluation, "perplexity_quantized")
    if is_number(before) and is_number(after):
        yield f"perplexity {before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.1f} %)"
    divergence = part(evaluation, "kl_divergence")
    if is_number(divergence):
        yield f"KL divergence {number(divergence)} nats a token"
    source, output = part(report.get("bytes"), "source"), part(report.get("bytes"), "output")
    if source and output:
        yield f"{size(source)} -> {size(output)}"
    hours = machine_hours(report)
    if hours is not None:
        yield hours
