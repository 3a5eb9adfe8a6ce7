"""The result of an evaluation in words."""

from collections.abc import Mapping
from typing import Any


def format_evaluation(result: Mapping[str, Any]) -> str:
    """What `quantlib.evaluation.evaluate_checkpoint` gives, for a terminal."""
    lines = [f"{result['model']}: perplexity {result['perplexity']:.4f} over {result['tokens']} tokens"]
    for words, count in result["rounded_inputs"].items():
        lines.append(f"inputs of {count} linears rounded to {words}, as engines do")
    for words, count in result["unknown_inputs"].items():
        lines.append(f"inputs of {count} linears left as they are; engines round them with {words}")
    return "\n".join(lines)
