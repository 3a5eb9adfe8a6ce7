"""Conversions in several states, made on the server of the tests without converting anything.

Prints JSON: run ids by what became of them.
"""

import json
import sys
import time

from prefect import flow
from prefect.artifacts import create_progress_artifact
from prefect.runtime import flow_run
from prefect.states import Cancelled

from quantlib.errors import RecipeError
from quantlib.job.stages import Progress


def main() -> None:
    from flows.artifacts import PROGRESS_KEY
    from flows.run_view import RunView

    found: dict[str, str] = {}

    @flow(name="quantize-model", flow_run_name="of-the-status-test {end}")
    def run(end: str) -> object:
        found[end] = flow_run.id
        if end == "running":
            # What the view shows of it some seconds later.
            create_progress_artifact(25.0, PROGRESS_KEY, "unit 1")
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            time.sleep(600)
        with RunView() as view:
            view.show(Progress(done=1, total=4, label="unit 1"))
            if end == "failed":
                raise RecipeError("the text is too short", option="calibration")
            if end == "cancelled":
                return Cancelled(message="nobody needs it")
            view.show(Progress(done=4, total=4, label="done"))
        return None

    for end in ("completed", "failed", "cancelled", "running"):
        run(end, return_state=True)


if __name__ == "__main__":
    main()
    sys.exit()
