"""``python -m quantlib``: every command in one process, without Prefect and Ray.

Exit codes: 0 done, 2 the request is wrong (nothing was written), 1 failed.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from quantlib.checkpoint.inspect import format_inspection, inspect_checkpoint
from quantlib.errors import (
    CheckpointError,
    CorpusError,
    ObjectNotFoundError,
    PackingError,
    PlanMismatchError,
    QuantError,
    RecipeError,
    UnsupportedModelError,
)
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize_all
from quantlib.job.clean import clean_work, format_cleaned
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.command_line import (
    COMMANDS,
    after_interrupt,
    build_parser,
    comparison_values,
    publication_wishes,
    requests_of,
    values_of,
)
from quantlib.job.comparison_request import comparison_request
from quantlib.job.comparison_run import compare
from quantlib.job.comparison_text import format_comparison
from quantlib.job.estimate import describe_plan, format_plan
from quantlib.job.evaluation_text import format_evaluation
from quantlib.job.hook import HOOKS_VARIABLE, configured_hooks
from quantlib.job.memory import Room, Surroundings, budgets_from, heap_bytes, plan_memory
from quantlib.job.options import JobOptions
from quantlib.job.planner import build_plan, open_planned_source, plan_all
from quantlib.job.progress_bar import progress_bar
from quantlib.job.publish_later import publish_later
from quantlib.job.report import HTML_NAME, REPORT_NAME
from quantlib.job.report_publication import is_staged
from quantlib.job.report_text import format_report, format_summary
from quantlib.job.staged_output import read_staged_report
from quantlib.job.targets import DEFAULT_FORMAT
from quantlib.job.verification_text import all_findings, format_verification
from quantlib.machine import default_threads, measured_flops_per_second
from quantlib.memory_watch import machine_memory_bytes, memory_bytes
from quantlib.schemes import DEFAULT_GROUP_SIZE, WHOLE_ROW, has_own_groups
from quantlib.simulation.config_shapes import is_shipped, shipped_shape
from quantlib.simulation.hardware import DEFAULT_NETWORK, DEFAULT_STORAGE, parse_cluster
from quantlib.simulation.prediction import format_prediction, parse_price, predict, workload_of
from quantlib.simulation.scheme_table import (
    ServedWeights,
    format_schemes,
    scheme_table,
    weights_of_plan,
    weights_of_shape,
)
from quantlib.simulation.shapes import ModelShape, shape_of_plan
from quantlib.storage import join_uri, normalize_uri, open_store
from quantlib.units import parse_bytes
from quantlib.verification import verify_output

_INTERRUPTED = 130
_WRITING = ("quantize", "compare", "publish")
# What a command other than these raises when it was asked for something that cannot be.
_REQUEST_ERRORS = (
    CheckpointError,
    CorpusError,
    ObjectNotFoundError,
    PackingError,
    PlanMismatchError,
    RecipeError,
    UnsupportedModelError,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives its exit code."""
    parsed = build_parser("quantmill", COMMANDS).parse_args(arguments)
    _show_logs(is_verbose=parsed.verbose)
    try:
        return _RUN[parsed.command](parsed)
    except QuantError as error:
        if parsed.verbose:
            traceback.print_exc()
        print(f"quantmill: error: {error}", file=sys.stderr)
        return (
            2
            if error.before_work or (parsed.command not in _WRITING and isinstance(error, _REQUEST_ERRORS))
            else 1
        )
    except KeyboardInterrupt:
        print(f"quantmill: interrupted; {after_interrupt(parsed)}", file=sys.stderr)
        return _INTERRUPTED


def _show_logs(*, is_verbose: bool) -> None:
    # Where nobody hears a logger, Python writes its warnings to stderr, across the progress bar.
    handler = logging.StreamHandler() if is_verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("quantlib")
    logger.addHandler(handler)
    if is_verbose:
        logger.setLevel(logging.INFO)


def _plan(parsed: argparse.Namespace) -> int:
    requests = requests_of(parsed)
    options = requests[0]
    if parsed.cluster is not None:
        return _predict(parsed, options)
    if parsed.gpu_memory is not None:
        return _schemes(parsed, options)
    if is_shipped(options.source):
        raise RecipeError(
            f"{options.source} has no weights: it can only be predicted; name a --cluster, or --gpu-memory"
        )
    num_workers = options.workers or 1
    bundle = plan_all(requests, default_threads(num_workers))
    is_here = options.runner == "inprocess"
    surroundings = Surroundings(
        workers=num_workers,
        idle_bytes=memory_bytes(),
        kept_bytes=heap_bytes(bundle, options),
        has_device=bundle.shared.device_kind.startswith("cuda"),
        store_workers=0 if is_here else num_workers,
    )
    room = Room(worker_bytes=machine_memory_bytes() if is_here else None)
    memory = plan_memory(bundle, surroundings, budgets_from(options, room))
    flops_per_second = measured_flops_per_second(bundle.shared.threads)
    described = [
        describe_plan(
            plan,
            memory,
            num_workers=num_workers,
            flops_per_second=flops_per_second,
            packed_with=[other.output for other in bundle.packed_with(number)],
        )
        for number, plan in enumerate(bundle.outputs)
    ]
    if parsed.json:
        print(json.dumps(described[0] if len(described) == 1 else described, indent=1))
    else:
        print("\n\n".join(map(format_plan, described)))
    return 0


def _predict(parsed: argparse.Namespace, options: JobOptions) -> int:
    cluster = parse_cluster(
        parsed.cluster,
        network=parsed.network or DEFAULT_NETWORK,
        storage=parsed.storage or DEFAULT_STORAGE,
        rates=parsed.rates,
    )
    price = parse_price(parsed.price)
    shape = shipped_shape(options) if is_shipped(options.source) else _shape_of_source(options)
    found = predict(shape, workload_of(options, shape), cluster, price=price)
    print(json.dumps(found, indent=1) if parsed.json else format_prediction(found))
    return 0


def _schemes(parsed: argparse.Namespace, options: JobOptions) -> int:
    gpu_bytes = parse_bytes(parsed.gpu_memory, "gpu_memory")
    if is_shipped(options.source):
        weights = weights_of_shape(shipped_shape(options))
    else:
        weights = _weights_of_source(options)
    named = None if has_own_groups(options.scheme) else options.group_size
    table = scheme_table(weights, gpu_bytes, DEFAULT_GROUP_SIZE if named is None else named)
    print(json.dumps(table, indent=1) if parsed.json else format_schemes(table))
    return 0


def _weights_of_source(options: JobOptions) -> ServedWeights:
    """With linears of any width: the schemes of the table have other groups than the request."""
    widths = {"format": DEFAULT_FORMAT, "scheme": "W8A16", "group_size": WHOLE_ROW, "target": None}
    # Weights have no sequences: of any length they are fine.
    texts = {"calibration": None, "evaluation": None, "sequence_length": 8}
    plan, _ = build_plan(dataclasses.replace(options, **widths, **texts), threads=1)
    checkpoint = open_planned_source(open_store(plan.source, options.storage_engine), plan)
    return weights_of_plan(plan, [tuple(entry.shape) for entry in checkpoint.tensors.values()])


def _shape_of_source(options: JobOptions) -> ModelShape:
    plan, _ = build_plan(dataclasses.replace(options, calibration=None, evaluation=None), threads=1)
    checkpoint = open_planned_source(open_store(plan.source, options.storage_engine), plan)
    sizes = {name: entry.end - entry.start for name, entry in checkpoint.tensors.items()}
    return shape_of_plan(plan, checkpoint.config, sizes)


def _quantize(parsed: argparse.Namespace) -> int:
    requests = requests_of(parsed)
    with progress_bar() as on_progress, _interrupted_by_termination():
        _print_reports(quantize_all(requests, on_progress, _hooks()), is_json=parsed.json)
    return 0


def _publish(parsed: argparse.Namespace) -> int:
    values, wishes = values_of(parsed), publication_wishes(parsed)
    with progress_bar() as on_progress, _interrupted_by_termination():
        report = publish_later(
            parsed.output,
            work=values["work"],
            storage_engine=values["storage_engine"],
            wishes=wishes,
            hooks=_hooks(),
            on_progress=on_progress,
        )
    _print_reports([report], is_json=parsed.json)
    return 0


def _hooks() -> CommandHooks:
    try:
        return CommandHooks(configured_hooks(os.environ.get(HOOKS_VARIABLE)))
    except RecipeError as error:
        error.before_work = True
        raise


def _print_reports(reports: Sequence[dict[str, Any]], *, is_json: bool) -> None:
    if is_json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
        return
    for report in reports:
        print(format_summary(report))
        if not is_staged(report):
            print(f"Report: {join_uri(report['output'], HTML_NAME)}")


def _compare(parsed: argparse.Namespace) -> int:
    request = comparison_request(comparison_values(parsed))
    with progress_bar() as on_progress, _interrupted_by_termination():
        comparison = compare(request, lambda requests: quantize_all(requests, on_progress))
    print(json.dumps(comparison, indent=1) if parsed.json else format_comparison(comparison))
    return 0


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Have a termination raise KeyboardInterrupt, so that what is not to be kept is removed then too."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _verify(parsed: argparse.Namespace) -> int:
    with progress_bar() as show:
        result = verify_output(
            parsed.output,
            source=parsed.source,
            against=parsed.against,
            storage_engine=values_of(parsed)["storage_engine"],
            on_progress=show,
        )
    print(json.dumps(result, indent=1) if parsed.json else format_verification(result))
    return 1 if all_findings(result) else 0


def _clean(parsed: argparse.Namespace) -> int:
    values = values_of(parsed)
    cleaned = clean_work(
        parsed.output,
        work=values["work"],
        storage_engine=values["storage_engine"],
        discard=parsed.discard,
    )
    print(json.dumps(dataclasses.asdict(cleaned), indent=1) if parsed.json else format_cleaned(cleaned))
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    values = values_of(parsed)
    with progress_bar() as show:
        result = evaluate_checkpoint(
            parsed.model,
            parsed.text,
            text_column=values["text_column"],
            sequences=values["evaluation_sequences"],
            sequence_length=values["sequence_length"],
            threads=values["threads_per_worker"],
            device=values["device"],
            storage_engine=values["storage_engine"],
            on_progress=show,
        )
    print(json.dumps(result, indent=1) if parsed.json else format_evaluation(result))
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    uri = normalize_uri(parsed.uri)
    found = inspect_checkpoint(open_store(uri, values_of(parsed)["storage_engine"]), uri)
    print(json.dumps(found, indent=1) if parsed.json else format_inspection(found))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    output, values = normalize_uri(parsed.output), values_of(parsed)
    uri, work = join_uri(output, REPORT_NAME), normalize_uri(values["work"] or f"{output}.quantmill")
    engine = values["storage_engine"]
    try:
        report = json.loads(open_store(uri, engine).read(uri))
    except ObjectNotFoundError as error:
        report = read_staged_report(open_store(work, engine), work)
        if report is None:
            raise PlanMismatchError(f"there is no {uri}: no run has finished there", uri=uri) from error
    print(json.dumps(report, indent=1) if parsed.json else format_report(report))
    return 0


_RUN: dict[str, Callable[[Any], int]] = {
    "plan": _plan,
    "quantize": _quantize,
    "compare": _compare,
    "verify": _verify,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "clean": _clean,
    "report": _report,
    "publish": _publish,
}

if __name__ == "__main__":
    code = main()
    if code == _INTERRUPTED:
        # The interpreter would wait for threads, which may be in the middle of a long request.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
