"""The `quantmill` command.

``quantize`` and ``compare`` call their flow in this process: against the configured Prefect server, or a
temporary one. ``serve`` registers deployments and executes their runs, ``status`` lists runs. Everything
else is ``python -m quantlib`` in a child process. Exit codes: 0 done, 2 the request is wrong (nothing was
written), 1 failed.
"""

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

from flows.child_process import run_quantlib
from flows.prefect_environment import prepare_prefect, refuse_unreachable_server
from quantlib.errors import QuantError, RecipeError
from quantlib.job.command_line import (
    COMMANDS,
    Command,
    after_interrupt,
    build_parser,
    comparison_values,
    publication_wishes,
    requests_of,
    values_of,
)
from quantlib.job.comparison_request import comparison_request
from quantlib.job.options import JobOptions

_PROGRAM = "quantmill"
_SERVE = Command(
    help="Register the deployments with the configured Prefect server and execute their runs.",
    addresses={},
    others=(
        ("--limit", {"type": int, "default": 1, "metavar": "N", "help": "Runs at a time. (default: 1)"}),
        (
            "--new-checkpoints",
            {
                "metavar": "FILE.toml",
                "help": "What passes over a prefix look for and make: the fields of the form of"
                " convert-new-checkpoints. Makes the deployment convert-new-checkpoints/scheduled.",
            },
        ),
        (
            "--every",
            {
                "type": int,
                "default": 15,
                "metavar": "MINUTES",
                "help": "How often such a pass is made. (default: 15)",
            },
        ),
    ),
)
_STATUS = Command(
    help="Conversions that the configured Prefect server knows: state, progress, time left, reason.",
    addresses={},
    others=(
        (
            "--limit",
            {"type": int, "default": 10, "metavar": "N", "help": "The newest N, 200 at most. (default: 10)"},
        ),
        ("--json", {"action": "store_true", "help": "Print JSON instead of text."}),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of this process by default.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser(_PROGRAM, {**COMMANDS, "serve": _SERVE, "status": _STATUS}).parse_args(argv)
    try:
        return _dispatch(arguments, argv)
    except QuantError as error:
        if arguments.verbose:
            traceback.print_exc()
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 2 if error.before_work else 1
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted; {after_interrupt(arguments)}", file=sys.stderr)
        return 130


def _dispatch(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.command == "serve":
        return _serve(arguments)
    if arguments.command == "status":
        return _status(arguments)
    if arguments.command == "compare":
        values = comparison_values(arguments)
        is_here = comparison_request(values).options.runner == "inprocess"
        return run_quantlib(argv) if is_here else _compare(values, arguments)
    if arguments.command not in ("plan", "quantize"):
        check = publication_wishes if arguments.command == "publish" else values_of
        check(arguments)  # refused here, before a process that loads torch is started
        return run_quantlib(argv)
    requests = requests_of(arguments)
    if arguments.command == "plan" or any(options.runner == "inprocess" for options in requests):
        return run_quantlib(argv)
    return _quantize(requests, arguments)


def _find_server(arguments: argparse.Namespace) -> None:
    """Have Prefect's environment in place: what imports Prefect, which reads it then, comes after this."""
    is_temporary = prepare_prefect(is_verbose=arguments.verbose)
    if is_temporary:
        print(f"{_PROGRAM}: starting a temporary Prefect server", file=sys.stderr)
    else:
        refuse_unreachable_server()


def _quantize(requests: Sequence[JobOptions], arguments: argparse.Namespace) -> int:
    _find_server(arguments)
    from flows.params import params_from
    from flows.progress import progress_heard_by
    from flows.quantize_model import quantize_model, quantize_recipes
    from flows.suspension import suspension_interrupts
    from quantlib.job.progress_bar import progress_bar

    hear_interrupts()
    with suspension_interrupts(), progress_bar() as show, progress_heard_by(show):
        if len(requests) == 1:
            found = quantize_model(params_from(requests[0]))
        else:
            found = quantize_recipes([params_from(options) for options in requests])
    _print_reports(found if isinstance(found, list) else [found], is_json=arguments.json)
    return 0


def _compare(values: dict[str, Any], arguments: argparse.Namespace) -> int:
    _find_server(arguments)
    from flows.params import CompareParams
    from flows.progress import progress_heard_by
    from flows.quantize_model import compare_schemes
    from flows.suspension import suspension_interrupts
    from quantlib.job.comparison_text import format_comparison
    from quantlib.job.progress_bar import progress_bar

    hear_interrupts()
    with suspension_interrupts(), progress_bar() as show, progress_heard_by(show):
        comparison = compare_schemes(CompareParams.model_validate(values))
    print(json.dumps(comparison, indent=1) if arguments.json else format_comparison(comparison))
    return 0


def hear_interrupts() -> None:
    """Have an interrupt raise KeyboardInterrupt wherever it comes.

    In place of Python's own handler, and of no other, asyncio puts one while it runs that cancels instead;
    what swallows the cancellation then swallows the interrupt.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _print_reports(reports: Sequence[dict[str, Any]], *, is_json: bool) -> None:
    from flows.summary import report_uri
    from quantlib.job.report_publication import is_staged
    from quantlib.job.report_text import format_summary

    if is_json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=2))
        return
    for report in reports:
        print(format_summary(report))
        if not is_staged(report):
            print(f"report: {report_uri(report)}")


def _serve(arguments: argparse.Namespace) -> int:
    _refuse_below_one("limit", arguments.limit)
    _refuse_below_one("every", arguments.every)
    from flows.params import read_new_checkpoints

    file = arguments.new_checkpoints
    params = None if file is None else read_new_checkpoints(file)
    refuse_unreachable_server()
    from flows.deployments import Passes, serve_deployments

    passes = None if params is None else Passes(params=params, every_s=60 * arguments.every)

    def registered(count: int) -> None:
        runs = "one run" if arguments.limit == 1 else f"{arguments.limit} runs"
        # Whoever writes this to a file reads it at once.
        print(f"serving {count} deployments, {runs} at a time; Ctrl-C ends it", flush=True)

    serve_deployments(arguments.limit, passes, registered)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    _refuse_below_one("limit", arguments.limit)
    refuse_unreachable_server()
    from flows.status import MOST_RUNS, format_conversions, read_conversions

    rows = read_conversions(min(arguments.limit, MOST_RUNS))
    print(json.dumps(rows, indent=1) if arguments.json else format_conversions(rows))
    return 0


def _refuse_below_one(name: str, value: int) -> None:
    if value < 1:
        error = RecipeError(f"{name} must be at least 1, found {value}", option=name)
        error.before_work = True
        raise error
