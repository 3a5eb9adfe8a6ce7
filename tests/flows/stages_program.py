"""A flow over the project's stages and artifacts, run as a program against the server of the tests.

Prints JSON: what each stage gave or raised, and how often it was called.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from quantlib.errors import QuantError, RecipeError, TransientStorageError


def failing(times: int, error: Exception) -> tuple[Callable[[str], dict], list[str]]:
    """A stage that raises ``error`` so many times, and the list of its calls."""
    calls: list[str] = []

    def stage(word: str) -> dict:
        calls.append(word)
        if len(calls) <= times:
            raise error
        return {"word": word}

    return stage, calls


def outcome(stages: Any, name: str, times: int, error: Exception) -> dict[str, Any]:
    stage, calls = failing(times, error)
    try:
        result, is_same_error = stages.submit(name, stage, name).result(), False
    except (QuantError, ValueError) as raised:
        result, is_same_error = None, raised is error
    return {"result": result, "is_same_error": is_same_error, "calls": len(calls)}


def log_from_elsewhere() -> None:
    """As threads of Ray and of the dispatcher do, which know of no flow run."""
    logging.getLogger("quantlib.job").info("block 17/80: from a thread")
    logging.getLogger("quantlib.job").debug("too small")
    logging.getLogger("other").warning("of somebody else")


def shown_when(is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Key -> data and description of the running flow's artifacts, once they are as wanted."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.runtime import flow_run

    deadline = time.monotonic() + 60
    shown: dict[str, Any] = {}
    while not is_there(shown) and time.monotonic() < deadline:
        time.sleep(0.2)
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        found = get_client(sync_client=True).read_artifacts(flow_run_filter=mine)
        shown = {artifact.key: [artifact.data, artifact.description] for artifact in found}
    return shown


def main() -> None:
    from prefect import flow

    from flows.artifacts import publish_report
    from flows.run_log import logs_in_run
    from flows.run_view import RunView
    from flows.stages import PrefectStages
    from quantlib.job.stages import FinishedBlock, Progress
    from tests.flows.sample_report import sample_report

    refused = RecipeError("wrong", option="scheme")
    refused.before_work = True

    @flow(name="stages-program")
    def run() -> dict[str, Any]:
        stages = PrefectStages()
        found = {
            "passes": outcome(stages, "block 1/2: capture", 0, ValueError("never raised")),
            "may pass": outcome(stages, "block 1/2: solve", 1, TransientStorageError("lost", uri="s3://x/y")),
            "wrong request": outcome(stages, "plan", 9, refused),
            "bug": outcome(stages, "head", 9, ValueError("a bug")),
        }
        report = sample_report()
        first, _ = (FinishedBlock(output=report["output"], row=row) for row in report["blocks"])
        with logs_in_run(), RunView() as view:
            thread = threading.Thread(target=log_from_elsewhere)
            thread.start()
            view.show(Progress(done=0, total=100, label="step 0"))
            view.show(Progress(done=50, total=100, label="step 50", finished=(first,)))
            # What is shown now is looked up by the test: the bar and a table of one block.
            found["shown meanwhile"] = shown_when(lambda shown: "quantize-blocks" in shown)
            for done in range(51, 101):
                view.show(Progress(done=done, total=100, label=f"step {done}"))
            view.show_reports([report])
            thread.join()
        logging.getLogger("quantlib.job").info("not of this run")
        publish_report(report)
        return found

    found = run()
    found["wrong request"]["before_work"] = refused.before_work
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
