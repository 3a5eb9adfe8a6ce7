"""Runs that end in several ways, each telling whom the environment names.

Prints JSON: the ids of the runs by how they end.
"""

import json
import sys
from typing import Any
from uuid import UUID

from quantlib.errors import RecipeError


def main() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling

    from flows.notifications import NOTIFIED
    from tests.flows.sample_report import sample_report

    found: dict[str, str] = {}

    @flow(name="notifying-program", flow_run_name="that {end}", persist_result=False, **NOTIFIED)
    def run(end: str) -> dict[str, Any]:
        found[end] = str(flow_run.id)
        if end == "failed":
            raise RecipeError("the text is too short", option="calibration")
        if end == "told to end":
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(UUID(found[end]), Cancelling(), force=True)
        if end in ("crashed", "told to end"):
            raise KeyboardInterrupt
        return sample_report()

    for end in ("completed", "failed", "crashed", "told to end"):
        try:
            run(end)
        except (RecipeError, KeyboardInterrupt):
            continue
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
