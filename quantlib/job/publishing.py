"""From staged outputs to published ones: gates, then the hook, then the files that make it a checkpoint.

``config.json`` is the very last of them: whoever finds one finds a whole model. An output that does not pass
stays staged and keeps no other from being published.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from quantlib.checkpoint.index import CONFIG_NAME, INDEX_NAME, STAGED_NAME
from quantlib.errors import GateError, HookError, QuantError
from quantlib.job.gates import check_gates, limits_of, refuse_broken
from quantlib.job.lease import refuse_taken_over
from quantlib.job.report import HTML_NAME, REPORT_NAME
from quantlib.job.report_html import render_html
from quantlib.job.staged_output import STAGED_ONLY, StagedOutput, store_staged_report
from quantlib.storage import join_uri, uri_name

# Calls a function as a stage of the run, by a name for people.
Call = Callable[..., Any]


class Hooks(Protocol):
    """Carries out the hooks of a run."""

    def refuse_unknown(self, hook: str) -> None:
        """Make sure that a hook can be begun.

        Raises:
            RecipeError: It cannot.
        """
        ...

    def run(self, hook: str, timeout_s: int, staged: StagedOutput) -> dict[str, Any]:
        """Carry out a hook, and wait for it.

        Returns:
            ``hook`` as it was named, ``exit_code`` (None where it took too long), ``seconds`` and
            ``output_end``, the last of what it wrote.

        Raises:
            HookError: It could not be begun, or was stopped.
            NoSpaceError: There is no room for its copy of the model.
        """
        ...

    def stop(self) -> None:
        """End the hook that is running, with all that it started; none is begun any more."""
        ...


def publish_all(
    outputs: Sequence[StagedOutput], hooks: Hooks, call: Call, run_id: str
) -> list[dict[str, Any]]:
    """Publish the outputs that pass, and tell of the others.

    Args:
        hooks: Carries out their hooks.
        call: Calls as a stage.
        run_id: The run that holds the leases of the work prefixes.

    Returns:
        The report of each; ``publication`` says what became of it.

    Raises:
        GateError: Some broke a gate, and are staged.
        HookError: The hooks of some did not pass; likewise.
    """
    reports: list[dict[str, Any]] = []
    refusals: dict[str, QuantError] = {}
    for staged in outputs:
        try:
            reports.append(_settled(staged, hooks, call, run_id))
        except (GateError, HookError) as error:
            refusals[staged.output] = error
    if refusals:
        raise _joined(refusals, reports)
    return reports


def _settled(staged: StagedOutput, hooks: Hooks, call: Call, run_id: str) -> dict[str, Any]:
    """Publish an output, or leave it as it is where nothing more is wanted."""
    gates = check_gates(staged.report, limits_of(staged.options))
    staged = _decided(staged, gates)
    call("keep the report", store_staged_report, staged.work_store, staged.work, staged.report)
    refuse_broken(staged.output, gates)
    if staged.options["publish"] == STAGED_ONLY:
        return dict(staged.report)
    outcome = None if staged.options["hook"] is None else _carried_out(staged, hooks, call)
    if outcome is not None and outcome["exit_code"] != 0:
        failed = _decided(staged, gates, outcome)
        call("keep the report", store_staged_report, staged.work_store, staged.work, failed.report)
        _refuse_failed(staged, outcome)
    passed = _passed(_decided(staged, gates, outcome))
    call("publish", publish, passed, run_id)
    return dict(passed.report)


def _decided(
    staged: StagedOutput, gates: Sequence[Mapping[str, Any]], hook: Mapping[str, Any] | None = None
) -> StagedOutput:
    """With a report that tells what it was held to, and what came of it."""
    publication = {"state": "staged", "gates": list(gates), "hook": hook}
    return replace(staged, report={**staged.report, "publication": publication})


def _passed(staged: StagedOutput) -> StagedOutput:
    """With the report that is published, which names the options that held in the end."""
    options = {**staged.report["options"], **staged.options}
    publication = {**staged.report["publication"], "state": "published"}
    return replace(staged, report={**staged.report, "options": options, "publication": publication})


def _carried_out(staged: StagedOutput, hooks: Hooks, call: Call) -> dict[str, Any]:
    try:
        return call("hook", hooks.run, staged.options["hook"], staged.options["hook_timeout"], staged)
    except QuantError:
        raise
    except BaseException:
        # Whoever interrupts the run is not heard by the thread that waits for the hook.
        hooks.stop()
        raise


def _refuse_failed(staged: StagedOutput, outcome: Mapping[str, Any]) -> None:
    code, end = outcome["exit_code"], outcome["output_end"].strip()
    limit = staged.options["hook_timeout"]
    how = f"took more than {limit} seconds" if code is None else f"ended with {code}, not 0"
    wrote = f"; it wrote:\n{end}" if end else ""
    raise HookError(
        f"{staged.output} is staged, not published: its hook {outcome['hook']!r} {how}. The same command"
        f" asks the hook again{wrote}",
        output=staged.output,
        reason=f"its hook {how}",
        hook=dict(outcome),
    )


def publish(staged: StagedOutput, run_id: str) -> None:
    """Write what makes a staged output a checkpoint.

    Args:
        staged: With the report that is to lie beside the shards.
        run_id: The run that holds the lease of the work prefix.

    Raises:
        LeaseError: Another run has taken over.
    """
    store = staged.output_store
    refuse_taken_over(staged.work_store, staged.work, run_id)
    names = staged.file_names()
    last = [name for name in (INDEX_NAME, CONFIG_NAME) if name in names]
    for name in (name for name in names if name not in last):
        store.write(join_uri(staged.output, name), staged.read_file(name))
    for name, content in (
        (REPORT_NAME, json.dumps(staged.report, indent=1, allow_nan=False)),
        (HTML_NAME, render_html(staged.report)),
    ):
        store.write(join_uri(staged.output, name), content.encode())
    store.delete(join_uri(staged.output, STAGED_NAME))
    for name in last:
        store.write(join_uri(staged.output, name), staged.read_file(name))


def _joined(refusals: Mapping[str, QuantError], reports: Sequence[Mapping[str, Any]]) -> QuantError:
    """One error for all outputs that did not pass; of an only output its own."""
    first = next(iter(refusals.values()))
    if len(refusals) == 1 and not reports:
        return first
    reasons = ", ".join(f"{uri_name(uri)} ({error.facts['reason']})" for uri, error in refusals.items())
    others = {"published": [], "staged as wanted": []}
    for report in reports:
        word = "published" if report["publication"]["state"] == "published" else "staged as wanted"
        others[word].append(uri_name(report["output"]))
    told = "".join(f"; {word}: {', '.join(names)}" for word, names in others.items() if names)
    return type(first)(
        f"{len(refusals)} of {len(refusals) + len(reports)} outputs are staged, not published:"
        f" {reasons}{told}. The same command tries them again",
        outputs=list(refusals),
        reason=reasons,
    )
