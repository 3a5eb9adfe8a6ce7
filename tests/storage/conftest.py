"""One store of every engine over an empty folder of its own."""

import uuid
from dataclasses import dataclass

import pytest

from quantlib.storage import Store, open_store


@dataclass(frozen=True)
class Place:
    """A store and the address of an empty folder in it."""

    store: Store
    root: str
    engine: str


@pytest.fixture(
    params=[
        "local",
        pytest.param("obstore", marks=pytest.mark.slow),
        pytest.param("s3fs", marks=pytest.mark.slow),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path) -> Place:
    if request.param == "local":
        return Place(store=open_store(f"file://{tmp_path}"), root=f"file://{tmp_path}/root", engine="local")
    server = request.getfixturevalue("s3_environment")
    root = server.uri(f"contract/{uuid.uuid4().hex}")
    return Place(store=open_store(root, request.param), root=root, engine=request.param)
