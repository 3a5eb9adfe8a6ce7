"""Statistics of a block's inputs: what is observed, and rows that are not finite."""

import pytest
import torch
from torch import nn

from quantlib.batches import batches_of, run_in_batches
from quantlib.errors import NumericsError
from quantlib.model.skeleton import BlockInputs
from quantlib.readers import Reader
from quantlib.steps import ObservedCell, observe_cell
from tests.support.partials import matrix_of


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


_READERS = {
    0: Reader(name="layers.0.a", path="a"),
    1: Reader(name="layers.0.c", path="c"),
}
_INPUTS = BlockInputs(args=(), kwargs={})
_BOTH = (0, 1)
# Rows of a batch: the cell at once, and in batches of which the last is smaller.
_BATCHES = pytest.mark.parametrize("rows_per_batch", [5, 2, 1])


def _observed(
    block: nn.Module,
    hidden: torch.Tensor,
    rows_per_batch: int,
    *,
    excluded: set[int] | tuple[()] = (),
    groups: tuple[int, ...] = _BOTH,
    centered: tuple[int, ...] = (),
    reference: torch.Tensor | None = None,
) -> ObservedCell:
    batches = [(rows, _INPUTS) for rows in batches_of(len(hidden), rows_per_batch)]
    return observe_cell(
        block, _READERS, hidden, batches, excluded, groups, centered=centered, reference_BTD=reference
    )


def _hidden(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(1))


def _expected(block: _Block, hidden: torch.Tensor) -> list[torch.Tensor]:
    x = hidden.double().reshape(-1, 6)
    a, b = block.a.weight.double(), block.b.weight.double()
    inner = (x @ a.T).clamp_min(0) + x @ b.T
    return [x.T @ x, inner.T @ inner]


@_BATCHES
@torch.inference_mode()
def test_observe_cell_sums_the_inputs_of_every_group(rows_per_batch: int):
    block, hidden = _Block(), _hidden()
    found = _observed(block, hidden, rows_per_batch)
    torch.testing.assert_close(found.output_BTD, block(hidden))
    assert (found.num_tokens, found.left_out, found.reference_BTD) == (15, set(), None)
    for group, expected in enumerate(_expected(block, hidden)):
        gram = matrix_of(found.statistics.grams[group])
        torch.testing.assert_close(gram.tril().double(), expected.tril(), rtol=1e-5, atol=1e-5)


@_BATCHES
@torch.inference_mode()
def test_observe_cell_leaves_out_rows_that_are_not_finite_and_names_them(rows_per_batch: int):
    block, hidden = _Block(), _hidden()
    hidden[1, 2, 0] = float("nan")
    hidden[3, 0, 5] = float("inf")
    found = _observed(block, hidden, rows_per_batch)
    assert found.left_out == {1, 3}
    assert found.num_tokens == 9
    for group, expected in enumerate(_expected(block, hidden[[0, 2, 4]])):
        gram = matrix_of(found.statistics.grams[group])
        torch.testing.assert_close(gram.tril().double(), expected.tril(), rtol=1e-5, atol=1e-5)


@_BATCHES
@torch.inference_mode()
@pytest.mark.parametrize("group", _BOTH)
def test_observe_cell_of_one_group_finds_the_same_rows_and_the_same_bits(group: int, rows_per_batch: int):
    """One row has an infinity that only the input of ``c`` shows."""
    block, hidden = _Dividing(), _hidden()
    hidden[2, 1] = 0.0
    whole = _observed(block, hidden, rows_per_batch)
    alone = _observed(block, hidden, rows_per_batch, groups=(group,))
    assert whole.left_out == {2}
    assert (alone.left_out, alone.num_tokens) == (whole.left_out, whole.num_tokens)
    assert list(alone.statistics.grams) == [group]
    found, wanted = (matrix_of(cell.statistics.grams[group]) for cell in (alone, whole))
    assert torch.equal(found, wanted)


@_BATCHES
@torch.inference_mode()
def test_observe_cell_keeps_rows_out_that_were_left_out_before(rows_per_batch: int):
    found = _observed(_Block(), _hidden(), rows_per_batch, excluded={4})
    assert found.left_out == {4}
    assert found.num_tokens == 12


@torch.inference_mode()
def test_observe_cell_finite_inputs_that_overflow_are_an_error_that_names_the_linear():
    with pytest.raises(NumericsError, match=r"layers\.0\.a"):
        _observed(_Block(), _hidden() * 1e25, 2)


@_BATCHES
@torch.inference_mode()
def test_observe_cell_gives_the_sums_of_groups_that_are_to_be_centered(rows_per_batch: int):
    """Of what the groups read and of what they read in the reference, without the row that is left out."""
    block, hidden = _Block(), _hidden()
    reference = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found = _observed(block, hidden, rows_per_batch, excluded={4}, centered=(0,), reference=reference)
    torch.testing.assert_close(found.reference_BTD, block(reference))
    x, its = (rows[:4].double().reshape(-1, 6) for rows in (hidden, reference))
    ones = torch.ones(12, 1, dtype=torch.float64)
    x1, its1 = torch.cat([x, ones], 1), torch.cat([its, ones], 1)
    gram, cross = found.statistics.grams, found.statistics.crosses
    torch.testing.assert_close(matrix_of(gram[0]).tril().double(), (x1.T @ x1).tril(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix_of(cross[0]).double(), its1.T @ x1, rtol=1e-5, atol=1e-5)
    # The other group has no bias that changes.
    assert [len(matrix_of(product)) for product in (gram[1], cross[1])] == [4, 4]


@_BATCHES
@torch.inference_mode()
def test_run_in_batches_sees_a_few_rows_at_a_time_and_gives_all(rows_per_batch: int):
    block, hidden, seen = _Block(), _hidden(), []
    block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    batches = [(rows, _INPUTS) for rows in batches_of(len(hidden), rows_per_batch)]
    found = run_in_batches(block, hidden, batches)
    assert max(seen) == rows_per_batch and sum(seen) == len(hidden)
    torch.testing.assert_close(found, block(hidden))


@_BATCHES
@torch.inference_mode()
def test_observe_cell_notes_the_columns_of_outliers(rows_per_batch: int):
    block, hidden = _Block(), _hidden()
    hidden[0, 0, 2], hidden[3, 2, 4], hidden[4, 1, 1], hidden[2, 0, 5] = 6.0, -70.0, 5.9999, 8.0
    # A row that is left out counts for nothing, whether that is known before or found out.
    hidden[2, 1, 0] = float("nan")
    for excluded in ((), {2}):
        found = _observed(block, hidden, rows_per_batch, excluded=excluded).statistics.outliers
        inner = _expected_inner(block, hidden[[0, 1, 3, 4]])
        for group, x in enumerate((hidden[[0, 1, 3, 4]].reshape(-1, 6), inner)):
            wanted = [c for c in range(x.shape[1]) if any(abs(v) >= 6 for v in x[:, c].tolist())]
            assert found[group].nonzero()[:, 0].tolist() == wanted, group
        assert found[0].tolist() == [False, False, True, False, True, False]


def _expected_inner(block: _Block, hidden: torch.Tensor) -> torch.Tensor:
    x = hidden.double().reshape(-1, 6)
    return (x @ block.a.weight.double().T).clamp_min(0) + x @ block.b.weight.double().T


@torch.inference_mode()
def test_observe_cell_looks_for_outliers_of_those_that_are_summed_alone():
    found = _observed(_Block(), _hidden() * 100, 5, groups=(1,)).statistics.outliers
    assert list(found) == [1] and bool(found[1].all())
