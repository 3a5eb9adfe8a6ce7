"""Second moments of a cell: precision, and what is not computed."""

import pytest
import torch

from quantlib.calibration.hessian import cross_product, gram_lower


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


def test_gram_lower_skips_most_of_the_upper_triangle():
    found = gram_lower(torch.ones(4, 1024))
    assert (found.triu(128) == 0).all()
