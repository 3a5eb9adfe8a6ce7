"""Credentials of object storage from a Prefect block, for as long as a run needs them.

A run names the block; what is in it goes into the environment of the run's own process, and from there to its
workers. It is part of no parameter, log, artifact or record.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quantlib.errors import RecipeError

BLOCK_TYPE = "aws-credentials"
BLOCK_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
BLOCK_HELP = (
    "Name of the Prefect block (AWS Credentials) with which object storage is reached; by default the"
    " environment of whoever executes the run."
)
# One identity: what the block does not say of it must not be taken from the environment.
_IDENTITY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@contextmanager
def storage_credentials(name: str | None) -> Iterator[Mapping[str, str]]:
    """Have this process reach object storage as a block says; imports Prefect.

    Args:
        name: Of a block of type AWS Credentials; None for the environment as it is.

    Yields:
        The environment variables that workers elsewhere need for the same; none without a block.

    Raises:
        RecipeError: With ``before_work`` set: there is no such block, or it says what cannot be used.
    """
    if name is None:
        yield {}
        return
    wanted = _variables(name, _load(name))
    names = {*_IDENTITY, *wanted}
    before = {variable: os.environ.get(variable) for variable in names}
    try:
        _set_environment({variable: wanted.get(variable) for variable in names})
        yield wanted
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for variable, value in values.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _load(name: str) -> Any:
    # It takes a second, which only runs that name a block spend.
    from prefect_aws.credentials import AwsCredentials

    try:
        return AwsCredentials.load(name)
    except ValueError as error:
        raise _refusal(
            f"credentials names the block {BLOCK_TYPE}/{name}, and the Prefect server has none of that name;"
            " create it under Blocks (AWS Credentials), or correct the name",
            name,
        ) from error


def _variables(name: str, block: Any) -> dict[str, str]:
    if block.assume_role_arn:
        raise _refusal(
            f"the block {BLOCK_TYPE}/{name} assumes a role, whose keys would expire during a long run; give"
            " the role to the machines, or name a profile that assumes it",
            name,
        )
    secret = block.aws_secret_access_key
    found = {
        "AWS_ACCESS_KEY_ID": block.aws_access_key_id,
        "AWS_SECRET_ACCESS_KEY": secret.get_secret_value() if secret is not None else None,
        "AWS_SESSION_TOKEN": block.aws_session_token,
        "AWS_PROFILE": block.profile_name,
        "AWS_REGION": block.region_name,
        "AWS_ENDPOINT_URL": block.aws_client_parameters.endpoint_url,
    }
    return {variable: value for variable, value in found.items() if value}


def _refusal(message: str, name: str) -> RecipeError:
    error = RecipeError(message, option="credentials", block=name)
    error.before_work = True
    return error
