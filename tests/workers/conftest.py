"""One small Ray cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest

from workers.resources import cluster


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with cluster(None):
        yield
