"""Tests of what runs on a GPU: collected everywhere, skipped as a whole where PyTorch finds none.

They need pytest, numpy, torch, triton and this repository, ``test_factor_on_gpu.py`` transformers and
safetensors too, and no fixture of the tests above: a machine that has no more runs them with
``pytest --confcutdir tests/gpu tests/gpu``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    return torch.device("cuda")


@pytest.fixture
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """Makes an error of whatever waits for the device inside a context."""

    @contextmanager
    def context() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
