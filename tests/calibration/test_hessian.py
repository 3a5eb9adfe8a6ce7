"""Second moments of a cell: precision, and what is not computed."""

import pytest
import torch

from quantlib.calibration.hessian import add_gram_
from quantlib.calibration.partials import Partial, panels_in
from quantlib.panels import panel_shapes, panels_of, strip_shapes
from tests.support.partials import cross_product, gram_lower, matrix_of


@pytest.mark.parametrize("tokens", [64, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 100, 128, 300, 2100])
def test_gram_lower_equals_float64_product(columns, dtype, tokens):
    x_NC = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = (x_NC.double().T @ x_NC.double()).tril()
    found = gram_lower(x_NC)
    assert found.dtype == torch.float32
    # A product rounded to 16 bits would be off by 4e-3 (bf16) or 5e-4 (fp16) of the largest entry; what is
    # allowed is that fp32 sums lose the last bit with every term.
    tolerance = tokens * 2.0**-24 * exact.max().item()
    torch.testing.assert_close(found.double().tril(), exact, rtol=0, atol=tolerance)
    whole = cross_product(x_NC.flip(1), x_NC)
    assert whole.dtype == torch.float32
    product = x_NC.double().flip(1).T @ x_NC.double()
    torch.testing.assert_close(whole.double(), product, rtol=0, atol=tolerance)


def test_gram_lower_input_with_strides_equals_contiguous_input():
    wide_NC = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    found = gram_lower(wide_NC[:, ::2])
    assert torch.equal(found.tril(), gram_lower(wide_NC[:, ::2].contiguous()).tril())


@pytest.mark.parametrize("columns", [100, 300])
@pytest.mark.parametrize("has_sums", [False, True])
def test_partial_of_several_batches_is_the_sum_over_all_tokens(columns, has_sums):
    generator = torch.Generator().manual_seed(1)
    x_NC, reference_NC = (torch.randn(90, columns, generator=generator) for _ in range(2))
    gram = Partial(columns, has_sums=has_sums)
    cross = Partial(columns, is_whole=True, has_sums=has_sums)
    for x_BC, reference_BC in zip(x_NC.split(40), reference_NC.split(40), strict=True):
        gram.add_(x_BC)
        cross.add_(x_BC, reference_BC)
        assert gram.panels is gram.panels  # asked for between batches it changes nothing
    ones_N1 = torch.ones(90, int(has_sums), dtype=torch.float64)
    x_NE, reference_NE = (torch.cat([side.double(), ones_N1], 1) for side in (x_NC, reference_NC))
    torch.testing.assert_close(matrix_of(gram).double().tril(), (x_NE.T @ x_NE).tril(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matrix_of(cross).double(), reference_NE.T @ x_NE, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram.diagonal, matrix_of(gram).diagonal(), rtol=0, atol=0)
    assert gram.peak == float(matrix_of(gram).diagonal().max())
    assert cross.peak == float(matrix_of(cross).abs().max())


@pytest.mark.parametrize(("columns", "panels"), [(1024, 8), (100, 1)])
def test_partial_of_a_symmetric_sum_holds_little_above_the_diagonal(columns, panels):
    gram = Partial(columns)
    assert len(gram.panels) == panels
    assert sum(panel.numel() for panel in gram.panels) <= max(
        columns * (columns + 128) / 2, columns**2 / panels
    )


@pytest.mark.parametrize("columns", [1, 300, 2048, 2049, 2300, 5120])
@pytest.mark.parametrize("has_sums", [False, True])
def test_panels_in_the_strips_of_a_gpu_hold_the_product(columns, has_sums):
    """Fewer and larger products, and the same sums where totals look for them."""
    x_NC = torch.randn(20, columns, generator=torch.Generator().manual_seed(2))
    exact_CC = x_NC.double().T @ x_NC.double()
    strips = [torch.zeros(shape) for shape in strip_shapes(columns + has_sums, "cuda")]
    for batch_NC in x_NC.split(12):
        add_gram_(strips, batch_NC)
    found = list(panels_in(strips, is_whole=False))
    assert [tuple(panel_PL.shape) for panel_PL in found] == panel_shapes(columns + has_sums, is_whole=False)
    for (start, end), panel_PL in zip(panels_of(columns + has_sums), found, strict=True):
        expected_PL = exact_CC[start:end, :end].tril(start)
        there_PL = panel_PL.tril(start)[: len(expected_PL), : expected_PL.shape[1]]
        torch.testing.assert_close(there_PL.double(), expected_PL, rtol=0, atol=1e-4)
        # What is beyond the inputs is not theirs.
        assert panel_PL.tril(start).count_nonzero() == there_PL.count_nonzero()


@pytest.mark.parametrize("columns", [2048, 2049, 4096, 5120, 7168, 16384, 32768])
def test_strips_of_a_gpu_are_few_and_hold_little_above_the_diagonal(columns):
    strips = strip_shapes(columns, "cuda")
    assert sum(rows for rows, _ in strips) == columns
    assert sum(rows * length for rows, length in strips) <= columns * (columns + 2048) / 2
    assert all(rows > 1536 for rows, _ in strips[:-1])
