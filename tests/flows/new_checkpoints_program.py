"""Serves the deployment that carries out conversions, or makes one pass over a prefix and says what it found.

``serve`` registers and executes runs until it is ended, ``pass JSON`` takes the parameters of a pass,
``keys`` begins runs with equal and other keys.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from uuid import UUID


def serve_recipes() -> None:
    from prefect import serve

    serve(deployment_of_recipes("quantize-recipes"), limit=1, print_starting_message=False)


def deployment_of_recipes(name: str) -> Any:
    from prefect.types.entrypoint import EntrypointType

    from flows.quantize_model import quantize_recipes

    return quantize_recipes.to_deployment(name=name, entrypoint_type=EntrypointType.MODULE_PATH)


def begin_by_key() -> dict[str, Any]:
    from prefect import flow
    from prefect.client.orchestration import get_client

    from flows.prefect_runs import PrefectRuns
    from quantlib.errors import RecipeError
    from quantlib.job.options import options_from

    @flow(name="takes-no-recipes")
    def takes_no_recipes(number: int) -> None: ...

    other: Any = takes_no_recipes.to_deployment(name="of-keys")
    for deployment in (deployment_of_recipes("of-keys"), other):
        deployment.apply()
    options = options_from({"source": "s3://models/m", "output": "s3://models/out", "method": "rtn"})
    with get_client(sync_client=True) as client:
        runs = PrefectRuns(client, "quantize-recipes/of-keys")
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(lambda key: runs.begin([options], key), "aaaabb"))
        before = runs.look(ids[0])
        client.delete_flow_run(UUID(ids[0]))
        found = {"ids": ids, "before": before and asdict(before), "gone": runs.look(ids[0])}
        try:
            PrefectRuns(client, "takes-no-recipes/of-keys").begin([options], "c")
        except RecipeError as error:
            found["refusal"] = error.message
        client.delete_flow_run(UUID(ids[-1]))
    return found


def one_pass(params: str) -> dict[str, Any]:
    from flows.convert_new_checkpoints import convert_new_checkpoints
    from flows.params import NewCheckpointsParams

    return convert_new_checkpoints(NewCheckpointsParams.model_validate_json(params))


def main() -> None:
    match sys.argv[1:]:
        case ["serve"]:
            serve_recipes()
        case ["keys"]:
            json.dump(begin_by_key(), sys.stdout)
        case ["pass", params]:
            json.dump(one_pass(params), sys.stdout)


if __name__ == "__main__":
    main()
