"""Second moments on a GPU: right, in place, and added up without waiting for it."""

from collections.abc import Iterator

import pytest
import torch

from quantlib.calibration.partials import Partial
from quantlib.calibration.totals import Total, exponent_for
from quantlib.errors import NumericsError
from quantlib.machine import keep_fp32_products
from quantlib.panels import panel_shapes, panels_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fp32_products() -> None:
    keep_fp32_products()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Makes an error of whatever waits for the device, where the test says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same numbers in any dtype but for their rounding, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def partial_on_gpu(x_NC: torch.Tensor, *references: torch.Tensor, has_sums: bool = False) -> Partial:
    partial = Partial(x_NC.shape[1], is_whole=bool(references), has_sums=has_sums, device=DEVICE)
    partial.add_(x_NC.to(DEVICE), *(reference_NC.to(DEVICE) for reference_NC in references))
    return partial


def allowed(tokens: int, exact_CC: torch.Tensor) -> float:
    """Every one of N sums in fp32, which tensor cores cut off where a CPU rounds, may lose the last bit."""
    return tokens * 2.0**-23 * exact_CC.abs().max().item()


def assert_lower_close(panel_PL: torch.Tensor, exact_PL: torch.Tensor, tolerance: float) -> None:
    """Below the diagonal, which a panel meets at its end."""
    rows, length = exact_PL.shape
    found_PL = panel_PL.cpu().double().tril(length - rows)
    torch.testing.assert_close(found_PL, exact_PL.tril(length - rows), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [64, 2500])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 100, 129, 2048, 2049, 4200])
def test_gram_equals_float64_product_below_the_diagonal(columns, dtype, tokens):
    x_NC = normal(tokens, columns, dtype=dtype)
    exact_CC = x_NC.double().T @ x_NC.double()
    found = partial_on_gpu(x_NC).panels
    assert [tuple(panel_PL.shape) for panel_PL in found] == panel_shapes(columns, is_whole=False)
    for (start, end), panel_PL in zip(panels_of(columns), found, strict=True):
        assert panel_PL.dtype == torch.float32
        assert_lower_close(panel_PL, exact_CC[start:end, :end], allowed(tokens, exact_CC))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [129, 2100])
def test_product_of_two_streams_equals_float64_product(columns, dtype):
    x_NC, reference_NC = (normal(300, columns, dtype=dtype, seed=seed) for seed in (1, 2))
    exact_CC = reference_NC.double().T @ x_NC.double()
    found_CC = torch.cat(partial_on_gpu(x_NC, reference_NC).panels).double().cpu()
    # Products of independent numbers cancel: what is lost goes by their sizes.
    tolerance = allowed(300, x_NC.double().T @ x_NC.double())
    torch.testing.assert_close(found_CC, exact_CC, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 300, 2049, 2300])
def test_batches_add_up_and_a_column_of_ones_counts(columns, dtype):
    x_NC = normal(700, columns, dtype=dtype)
    partial = Partial(columns, has_sums=True, device=DEVICE)
    for batch_NC in x_NC.split(256):
        partial.add_(batch_NC.to(DEVICE))
    exact_NE = torch.cat([x_NC.double(), torch.ones(700, 1, dtype=torch.float64)], 1)
    exact_CC = exact_NE.T @ exact_NE
    for (start, end), panel_PL in zip(panels_of(columns + 1), partial.panels, strict=True):
        assert_lower_close(panel_PL, exact_CC[start:end, :end], allowed(700, exact_CC))


def test_tf32_that_was_set_elsewhere_changes_nothing():
    x_NC = normal(2048, 1024)
    exact = partial_on_gpu(x_NC).panels
    torch.set_float32_matmul_precision("high")
    rounded = partial_on_gpu(x_NC).panels
    keep_fp32_products()
    found = partial_on_gpu(x_NC).panels
    assert all(torch.equal(its_PL, other_PL) for its_PL, other_PL in zip(found, exact, strict=True))
    if torch.cuda.get_device_capability() >= (8, 0):
        # Else this test would see nothing.
        assert not all(torch.equal(its_PL, other_PL) for its_PL, other_PL in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_added_in_place(dtype):
    columns = 4096
    x_NC = normal(512, columns, dtype=dtype).to(DEVICE)
    partial = Partial(columns, device=DEVICE)
    partial.add_(x_NC)  # cuBLAS takes its workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    partial.add_(x_NC)
    torch.cuda.synchronize()
    # The smallest product of this sum has 2048 * 2048 entries.
    assert torch.cuda.max_memory_allocated() - before < 4 * 2048 * 2048


@pytest.mark.parametrize("columns", [1, 129, 300, 2100, 4200])
@pytest.mark.parametrize("is_whole", [False, True])
def test_totals_of_the_same_partials_are_those_of_the_cpu_bit_for_bit(columns, is_whole):
    cells = [normal(200, columns, seed=seed) for seed in range(3)]
    exponent = exponent_for(200.0, len(cells))
    on_gpu, on_cpu = (
        Total.zeros(columns, exponent, is_whole=is_whole, device=device) for device in (DEVICE, "cpu")
    )
    for x_NC in cells:
        panels = partial_on_gpu(x_NC, *([x_NC.flip(1)] if is_whole else [])).panels
        on_gpu.add_(panels)
        on_cpu.add_([panel_PL.cpu() for panel_PL in panels])
    for its_PL, other_PL in zip(on_gpu.panels, on_cpu.panels, strict=True):
        assert its_PL.count_nonzero()
        assert torch.equal(its_PL.cpu(), other_PL)


@pytest.mark.parametrize("has_sums", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_a_cell_waits_for_nothing_but_the_note_of_what_was_refused(dtype, has_sums, no_waiting):
    columns = 2100
    x_NC = normal(256, columns, dtype=dtype).to(DEVICE)
    total = Total.zeros(columns + has_sums, 30, device=DEVICE)
    refused = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    partial = Partial(columns, has_sums=has_sums, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    partial.add_(x_NC)
    total.add_noting_(partial.panels, refused[0])
    torch.cuda.set_sync_debug_mode("default")
    assert refused.tolist() == [0]


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "finite"), (-float("inf"), "finite"), (2.0**62, "a thousand times")]
)
def test_what_does_not_fit_raises_as_on_the_cpu(value, said):
    columns, errors = 300, []
    for device in (DEVICE, "cpu"):
        partials = [torch.ones(shape, device=device) for shape in panel_shapes(columns, is_whole=False)]
        partials[1][100, 200] = value
        with pytest.raises(NumericsError, match=said) as caught:
            Total.zeros(columns, 0, device=device).add_(partials)
        errors.append(caught.value)
    assert errors[0].message == errors[1].message
    assert errors[0].facts == errors[1].facts


def test_totals_that_leave_their_range_raise_as_on_the_cpu():
    errors = []
    for device in (DEVICE, "cpu"):
        total = Total.zeros(40, 0, device=device)
        partials = [torch.full((40, 40), 2.0**61, device=device)]
        total.add_(partials)
        with pytest.raises(NumericsError, match="a thousand times") as caught:
            total.add_(partials)
        errors.append(caught.value.message)
    assert errors[0] == errors[1]
