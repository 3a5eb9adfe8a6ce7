"""Serves a flow that is asked as a hook whether an output may be published."""

from prefect import flow, serve
from prefect.client.orchestration import get_client
from prefect.deployments.runner import RunnerDeployment

from quantlib.storage import open_store


@flow(name="smoke-test")
def smoke_test(output: str, staged: str) -> None:
    """Look at what is staged, and refuse outputs below a folder of that name."""
    names = {info.uri.rpartition("/")[2] for info in open_store(staged).list(staged)}
    if not {"config.json", "quantmill_report.json"} <= names:
        raise ValueError(f"{staged} holds {sorted(names)} only")
    if "/refused/" in output:
        raise ValueError("the smoke test on another machine says no")


def main() -> None:
    deployment = smoke_test.to_deployment(name="here")
    assert isinstance(deployment, RunnerDeployment)
    serve(deployment, print_starting_message=False)


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        client.hello()
    main()
