"""Statistics of a block's inputs: what is observed, and rows that are not finite."""

import dataclasses

import pytest
import torch
from torch import nn

from quantlib.errors import NumericsError
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.model.skeleton import BlockInputs
from quantlib.steps import observe_cell, record_inputs


class _Block(nn.Module):
    """Two input groups: ``a`` and ``b`` read the input, ``c`` reads what ``a`` makes of it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Linear(6, 4, bias=False)
        self.b = nn.Linear(6, 4, bias=False)
        self.c = nn.Linear(4, 6, bias=False)
        for linear in (self.a, self.b, self.c):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.c(torch.relu(self.a(hidden)) + self.b(hidden))


class _Dividing(_Block):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.c(self.a(hidden) / hidden[..., :4])


_PLAN = BlockPlan(
    index=0,
    prefix="layers.0",
    tensors=(),
    linears=(),
    input_groups=(("layers.0.a", "layers.0.b"), ("layers.0.c",)),
)
_INPUTS = BlockInputs(args=(), kwargs={})
_BOTH = (0, 1)


def _hidden(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(1))


def _expected(block: _Block, hidden: torch.Tensor) -> list[torch.Tensor]:
    x = hidden.double().reshape(-1, 6)
    a, b = block.a.weight.double(), block.b.weight.double()
    inner = (x @ a.T).clamp_min(0) + x @ b.T
    return [x.T @ x, inner.T @ inner]


@torch.inference_mode()
def test_observe_cell_sums_the_inputs_of_every_group():
    block, hidden = _Block(), _hidden()
    output, statistics, excluded = observe_cell(block, _PLAN, hidden, _INPUTS, (), _BOTH)
    assert torch.equal(output, block(hidden))
    assert statistics.num_tokens == 15
    assert excluded == set()
    for group, expected in enumerate(_expected(block, hidden)):
        gram = statistics.grams[group]
        torch.testing.assert_close(gram.tril().double(), expected.tril(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_observe_cell_leaves_out_rows_that_are_not_finite_and_names_them():
    block, hidden = _Block(), _hidden()
    hidden[1, 2, 0] = float("nan")
    hidden[3, 0, 5] = float("inf")
    _, statistics, excluded = observe_cell(block, _PLAN, hidden, _INPUTS, (), _BOTH)
    assert excluded == {1, 3}
    assert statistics.num_tokens == 9
    for group, expected in enumerate(_expected(block, hidden[[0, 2, 4]])):
        gram = statistics.grams[group]
        torch.testing.assert_close(gram.tril().double(), expected.tril(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("group", _BOTH)
def test_observe_cell_of_one_group_finds_the_same_rows_and_the_same_bits(group: int):
    """One row has an infinity that only the input of ``c`` shows."""
    block, hidden = _Dividing(), _hidden()
    hidden[2, 1] = 0.0
    _, whole, excluded = observe_cell(block, _PLAN, hidden, _INPUTS, (), _BOTH)
    _, alone, excluded_alone = observe_cell(block, _PLAN, hidden, _INPUTS, (), (group,))
    assert excluded == {2}
    assert (excluded_alone, alone.num_tokens) == (excluded, whole.num_tokens)
    assert list(alone.grams) == [group]
    assert torch.equal(alone.grams[group], whole.grams[group])


@torch.inference_mode()
def test_observe_cell_keeps_rows_out_that_were_left_out_before():
    block, hidden = _Block(), _hidden()
    _, statistics, excluded = observe_cell(block, _PLAN, hidden, _INPUTS, {4}, _BOTH)
    assert excluded == {4}
    assert statistics.num_tokens == 12


@torch.inference_mode()
def test_observe_cell_finite_inputs_that_overflow_are_an_error_that_names_the_linear():
    with pytest.raises(NumericsError, match=r"layers\.0\.a"):
        observe_cell(_Block(), _PLAN, _hidden() * 1e25, _INPUTS, (), _BOTH)


@torch.inference_mode()
def test_observe_cell_gives_the_sums_of_groups_that_are_to_be_centered():
    """Of what the groups read and of what they read in the reference, without the row that is left out."""
    block, hidden = _Block(), _hidden()
    reference = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    kept = LinearPlan(name="layers.0.a", rows=4, columns=6, method=None, scheme=None, corrects_bias=False)
    corrected = LinearPlan(name="layers.0.b", rows=4, columns=6, method=None, scheme=None, corrects_bias=True)
    plan = dataclasses.replace(_PLAN, linears=(kept, corrected))
    _, read = record_inputs(block, plan, reference, _INPUTS)
    _, statistics, _ = observe_cell(block, plan, hidden, _INPUTS, {4}, _BOTH, read)
    x, its = (rows[:4].double().reshape(-1, 6) for rows in (hidden, reference))
    ones = torch.ones(12, 1, dtype=torch.float64)
    x1, its1 = torch.cat([x, ones], 1), torch.cat([its, ones], 1)
    gram = statistics.grams[0]
    torch.testing.assert_close(gram.tril().double(), (x1.T @ x1).tril(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.crosses[0].double(), its1.T @ x1, rtol=1e-5, atol=1e-5)
    # The other group has no bias that changes.
    assert [len(product) for product in (statistics.grams[1], statistics.crosses[1])] == [4, 4]
