"""Gates: limits that a converted model must keep to be published.

A gate is an option with a limit, and a figure of the report. A figure that could not be measured (a stream
that overflows, a model that is broken) breaks its gate: what is not known is not good.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantlib.errors import GateError, RecipeError
from quantlib.job.report_figures import is_number, number, part

# Options that tell what stands between a converted model and its publication; they change none of its bytes.
GATE_OPTIONS = ("max_perplexity_ratio", "max_kl", "max_fallback_share", "max_block_error")
_MEASURED = ("max_perplexity_ratio", "max_kl", "max_block_error")


def limits_of(options: Mapping[str, Any]) -> dict[str, float]:
    """The gates that are set, and their limits."""
    return {name: options[name] for name in GATE_OPTIONS if options.get(name) is not None}


def refuse_unmeasured(options: Mapping[str, Any]) -> None:
    """Refuse gates on figures that a run will not have.

    Raises:
        RecipeError: There is a gate on what held-out text measures, and no such text.
    """
    gate = next((name for name in limits_of(options) if name in _MEASURED), None)
    if gate is not None and options.get("evaluation") is None:
        raise RecipeError(
            f"{gate} {options[gate]} is a limit on what held-out text measures, and none was given; name it"
            " with evaluation, or leave the gate out",
            option=gate,
        )


def check_gates(report: Mapping[str, Any], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare the figures of a report with limits.

    Args:
        report: Of a run, as JSON values.
        limits: Gate -> largest allowed figure.

    Returns:
        For each gate ``gate``, ``limit``, ``figure`` (None where it is no finite number) and ``passed``; a
        figure that equals its limit passes.
    """
    found = []
    for gate, limit in limits.items():
        figure = _FIGURES[gate](report)
        figure = figure if is_number(figure) else None
        passed = figure is not None and figure <= limit
        found.append({"gate": gate, "limit": limit, "figure": figure, "passed": passed})
    return found


def refuse_broken(output: str, gates: Sequence[Mapping[str, Any]]) -> None:
    """Let nobody publish an output that breaks a gate.

    Raises:
        GateError: Names every gate that is broken.
    """
    broken = [gate for gate in gates if not gate["passed"]]
    if broken:
        reason = "; ".join(said(gate) for gate in broken)
        raise GateError(
            f"{output} is staged, not published: {reason}. Convert with another recipe, or raise the limit:"
            " the same command then publishes what is staged",
            output=output,
            reason=reason,
            gates=[dict(gate) for gate in broken],
        )


def said(gate: Mapping[str, Any]) -> str:
    """A gate in words.

    >>> said({"gate": "max_kl", "limit": 0.1, "figure": 0.25, "passed": False})
    'max_kl allows 0.1, found 0.25'
    """
    found = "no finite figure" if gate["figure"] is None else _told(gate["figure"], gate["limit"])
    return f"{gate['gate']} allows {gate['limit']}, found {found}"


def _told(figure: float, limit: float) -> str:
    """Rounded, unless it would then read as the limit."""
    rounded = number(figure)
    return rounded if float(rounded) != limit or figure == limit else repr(figure)


def _perplexity_ratio(report: Mapping[str, Any]) -> Any:
    return part(report["evaluation"], "ratio")


def _divergence(report: Mapping[str, Any]) -> Any:
    return part(report["evaluation"], "kl_divergence")


def _fallback_share(report: Mapping[str, Any]) -> Any:
    num_linears = sum(len(block["linears"]) for block in report["blocks"])
    return len(report["fallbacks"]) / num_linears if num_linears else 0.0


def _block_error(report: Mapping[str, Any]) -> Any:
    errors = [block["relative_error"] for block in report["blocks"]]
    return max(errors) if errors and all(is_number(error) for error in errors) else None


_FIGURES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "max_perplexity_ratio": _perplexity_ratio,
    "max_kl": _divergence,
    "max_fallback_share": _fallback_share,
    "max_block_error": _block_error,
}
