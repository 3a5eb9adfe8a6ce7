"""A flow over the project's stages and artifacts, run as a program against the server of the tests.

Prints JSON: what each stage gave or raised, and how often it was called.
"""

import json
import sys
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


def main() -> None:
    from prefect import flow

    from flows.artifacts import ProgressArtifact, publish_report
    from flows.stages import PrefectStages
    from quantlib.job.stages import Progress
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
        bar = ProgressArtifact()
        for done in range(101):
            bar.show(Progress(done=done, total=100, label=f"step {done}"))
        publish_report(sample_report())
        return found

    found = run()
    found["wrong request"]["before_work"] = refused.before_work
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
