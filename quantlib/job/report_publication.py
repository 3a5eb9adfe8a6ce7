"""What an output was held to before its publication, in words for all views of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantlib.job.report_figures import NOTHING, duration, number


def is_staged(report: Mapping[str, Any]) -> bool:
    """Whether a report is that of an output that is not published yet."""
    return (report.get("publication") or {}).get("state") == "staged"


def gate_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Gate, largest allowed figure, figure, and whether it passed; one row a gate."""
    gates: Sequence[Mapping[str, Any]] = (report.get("publication") or {}).get("gates") or ()
    return [
        (
            str(gate["gate"]),
            number(gate["limit"]),
            NOTHING if gate["figure"] is None else number(gate["figure"]),
            "passed" if gate["passed"] else "broken",
        )
        for gate in gates
    ]


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Whether an output is staged, and what its hook said; empty where there is nothing to tell.

    >>> hook = {"hook": "@smoke", "exit_code": 0, "seconds": 2.0}
    >>> sentences({"publication": {"state": "published", "gates": [], "hook": hook}})
    ['Hook @smoke ended with 0 after 2.0 s']
    """
    publication = report.get("publication") or {}
    found = []
    if is_staged(report):
        found.append(f"Staged, not published: quantmill publish {report.get('output')} publishes it")
    if hook := publication.get("hook"):
        code, seconds = hook["exit_code"], duration(hook["seconds"])
        how = f"was stopped after {seconds}" if code is None else f"ended with {code} after {seconds}"
        found.append(f"Hook {hook['hook']} {how}")
    return found
