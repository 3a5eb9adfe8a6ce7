"""A Prefect server of its own with `quantmill serve`, and a browser before it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import PrefectServer, running_prefect_server
from tests.support.prefect_ui import PrefectUi, open_page
from tests.support.serving import running_serve


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that knows no runs yet, and executes them."""
    folder = tmp_path_factory.mktemp("prefect")
    with running_prefect_server(folder) as (server, _), running_serve(server, folder):
        yield server


@pytest.fixture
def ui(served: PrefectServer, tmp_path: Path) -> Iterator[PrefectUi]:
    folder = Path(os.environ.get("QUANTMILL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"pictures: {folder}\n")
    with open_page() as page:
        prefect_ui = PrefectUi(page, served.api_url.removesuffix("/api"), folder)
        try:
            yield prefect_ui
        finally:
            # Where a test failed, this is what it saw last.
            prefect_ui.picture("last")
