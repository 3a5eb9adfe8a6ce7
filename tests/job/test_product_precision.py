"""A worker multiplies fp32 in fp32, whatever the process was set to before it opened a job."""

from collections.abc import Iterator

import pytest
import torch

from quantlib.block_runner import BlockRunner
from quantlib.job.bundle import bundle_of
from quantlib.job.planner import begin, prepare
from tests.support.tiny_jobs import tiny_options

PRODUCTS = torch.backends.cuda.matmul
SETTINGS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@pytest.fixture
def plan(tmp_path):
    prepared = prepare(tiny_options(tmp_path, method="rtn", evaluation=None), 1)
    begin([prepared])
    return prepared.plan


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    before = {name: getattr(PRODUCTS, name) for name in SETTINGS}
    yield
    torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        setattr(PRODUCTS, name, value)


def coarse_by_name() -> None:
    torch.set_float32_matmul_precision("medium")


def tf32_by_flag() -> None:
    PRODUCTS.allow_tf32 = True


def tf32_by_precision() -> None:
    PRODUCTS.fp32_precision = "tf32"


def everything_coarse() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("coarsen", [coarse_by_name, tf32_by_flag, tf32_by_precision, everything_coarse])
def test_worker_that_opens_a_job_takes_coarse_products_back(plan, coarsen):
    everything = torch.backends.fp32_precision
    try:
        coarsen()
        BlockRunner().open(bundle_of([plan]))
        assert torch.get_float32_matmul_precision() == "highest"
        assert PRODUCTS.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert not PRODUCTS.allow_tf32
    finally:
        torch.backends.fp32_precision = everything


@pytest.mark.parametrize("name", SETTINGS)
def test_worker_that_opens_a_job_adds_products_of_16_bits_up_in_fp32(plan, name):
    setattr(PRODUCTS, name, True)
    BlockRunner().open(bundle_of([plan]))
    assert not getattr(PRODUCTS, name)
