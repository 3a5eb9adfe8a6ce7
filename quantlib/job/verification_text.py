"""The result of a verification in words."""

from collections.abc import Mapping
from typing import Any

from quantlib.job.accounts import account_lines


def all_findings(result: Mapping[str, Any]) -> list[str]:
    """Faults that `quantlib.verification.verify_output` found, and differences from another output."""
    return [*result["findings"], *(result["against"]["findings"] if result["against"] else ())]


def format_verification(result: Mapping[str, Any]) -> str:
    """The result of `quantlib.verification.verify_output` for a terminal."""
    lines = [
        f"{result['output']}: {result['shards']} shards, {result['tensors']} tensors,"
        f" {result['bytes']:,} bytes read",
        *([f"tensors of {result['source']}:"] if result["source"] else []),
        *(f"  {line}" for line in account_lines(result["source_tensors"])),
        *(f"  wrong: {finding}" for finding in result["findings"]),
        f"{len(result['findings'])} finding(s)" if result["findings"] else "verified",
    ]
    against = result["against"]
    if against is not None:
        lines += [
            f"against {against['uri']}: {against['tensors']} tensors, {against['bytes']:,} bytes compared",
            *(f"  differs: {finding}" for finding in against["findings"]),
            f"{len(against['findings'])} difference(s)" if against["findings"] else "the same",
        ]
    return "\n".join(lines)
