"""Serves the deployment that carries out conversions, or makes one pass over a prefix and says what it found.

``serve`` registers and executes runs until it is ended; ``pass JSON`` takes the parameters of a pass.
"""

import json
import sys


def main() -> None:
    if sys.argv[1] == "serve":
        from prefect import serve
        from prefect.deployments.runner import RunnerDeployment
        from prefect.types.entrypoint import EntrypointType

        from flows.quantize_model import quantize_recipes

        deployment = quantize_recipes.to_deployment(
            name="quantize-recipes", entrypoint_type=EntrypointType.MODULE_PATH
        )
        assert isinstance(deployment, RunnerDeployment)
        serve(deployment, limit=1, print_starting_message=False)
        return
    from flows.convert_new_checkpoints import convert_new_checkpoints
    from flows.params import NewCheckpointsParams

    json.dump(convert_new_checkpoints(NewCheckpointsParams.model_validate_json(sys.argv[2])), sys.stdout)


if __name__ == "__main__":
    main()
