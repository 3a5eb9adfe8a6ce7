"""Sums of routed experts' inputs beside those of rows that plain hooks see, in float64."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.batches import batches_of
from quantlib.calibration.totals import Total, add_totals_, exponent_for, matrix_from
from quantlib.model.experts import Experts
from quantlib.model.skeleton import load_skeleton
from quantlib.readers import Reader
from quantlib.steps import ObservedCell, observe_cell
from tests.support.partials import matrix_of, partial_of
from tests.support.tiny_models import read_all_tensors, read_config, save_tiny_checkpoint

_ROWS, _POSITIONS = 5, 11


@dataclasses.dataclass
class _Example:
    block: nn.Module
    experts: str
    hidden_BTD: torch.Tensor
    batches: list[tuple[slice, Any]]

    def observed(self, readers: dict[int, Reader], **arguments: Any) -> ObservedCell:
        given = {"excluded": (), "summed": readers, **arguments}
        excluded, summed = given.pop("excluded"), given.pop("summed")
        return observe_cell(self.block, readers, self.hidden_BTD, self.batches, excluded, summed, **given)


@pytest.fixture(scope="module", params=["mixtral", "llama4_text", "gpt_oss"])
def example(request, tmp_path_factory) -> _Example:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_tiny_checkpoint(folder, request.param)
    tensors = read_all_tensors(folder)
    skeleton = load_skeleton(read_config(folder), tensors)
    block = skeleton.build_block(3, tensors, dtype=torch.float32, device="cpu")
    ids_BT = torch.randint(3, 90, (_ROWS, _POSITIONS), generator=torch.Generator().manual_seed(7))
    outer = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu")
    hidden_BTD, _ = outer.embed(ids_BT)
    batches = [(rows, outer.embed(ids_BT[rows])[1][3]) for rows in batches_of(_ROWS, 2)]
    (experts,) = [path for path, module in block.named_modules() if isinstance(module, Experts)]
    return _Example(block, experts, hidden_BTD, batches)


def _rows_read(example: _Example, rows: list[int]) -> dict[str, torch.Tensor]:
    """Path of a linear -> what it reads while these sequences run one by one, without anything observed."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0].double()))
        for path, module in example.block.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(f"{example.experts}.")
    ]
    inputs = next(inputs for batch, inputs in example.batches if batch.stop - batch.start == 1)
    for row in rows:
        output = example.block(example.hidden_BTD[row : row + 1], *inputs.args, **inputs.kwargs)
        del output
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def _readers(example: _Example, **of_down: Any) -> dict[int, Reader]:
    first = {
        expert: Reader(name="", path=f"{example.experts}.{expert}.up_proj", experts=example.experts)
        for expert in range(4)
    }
    downs = {
        4 + expert: Reader(
            name="", path=f"{example.experts}.{expert}.down_proj", experts=example.experts, **of_down
        )
        for expert in range(4)
    }
    pool = Reader(name="", path=f"{example.experts}.inputs", experts=example.experts)
    return {**first, **downs, 8: pool}


def _assert_gram(found: ObservedCell, number: int, wanted_CC: torch.Tensor) -> None:
    gram_CC = matrix_of(found.statistics.grams[number]).double()
    torch.testing.assert_close(gram_CC.tril(), wanted_CC.tril(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("excluded", [(), (1, 4)])
@torch.inference_mode()
def test_expert_is_summed_over_the_tokens_that_it_was_given(example, excluded):
    rows = [row for row in range(_ROWS) if row not in excluded]
    wanted = _rows_read(example, rows)
    found = example.observed(_readers(example), excluded=excluded)
    for number, reader in _readers(example).items():
        if number == 8:
            continue
        x_NC = wanted.get(reader.path, torch.zeros(0, 1))
        assert found.statistics.rows[number] == len(x_NC)
        if len(x_NC):
            _assert_gram(found, number, x_NC.T @ x_NC)
    assert found.num_tokens == len(rows) * _POSITIONS


@torch.inference_mode()
def test_pool_is_summed_over_what_all_experts_are_given(example):
    found = example.observed(_readers(example))
    wanted = _rows_read(example, list(range(_ROWS)))
    every = torch.cat([rows for path, rows in wanted.items() if path.endswith("up_proj")])
    # Each token is given to two experts: to both as it is, or scaled by the router to each as it is for it.
    is_scaled = found.statistics.rows[8] == 2 * _ROWS * _POSITIONS
    if not is_scaled:
        assert found.statistics.rows[8] == _ROWS * _POSITIONS
    _assert_gram(found, 8, every.T @ every / (1 if is_scaled else 2))


@torch.inference_mode()
def test_rows_run_besides_are_weighed_and_move_no_output(example):
    plain, found = example.observed(_readers(example)), example.observed(_readers(example, extra_share=0.25))
    assert torch.equal(found.output_BTD, plain.output_BTD)
    assert found.statistics.rows == plain.statistics.rows
    for number in (0, 1, 2, 3, 8):
        assert torch.equal(*(matrix_of(cell.statistics.grams[number]) for cell in (found, plain)))
    for expert in range(4):
        gram_CC, own_CC = (matrix_of(x.statistics.grams[4 + expert]).double() for x in (found, plain))
        extra_CC = (gram_CC - own_CC).tril()
        wanted_CC = torch.zeros_like(extra_CC)
        for rows, inputs in example.batches:
            hidden_BTD = example.hidden_BTD[rows]
            weight = 0.25 * hidden_BTD.shape[0] * _POSITIONS
            x_NC = _foreign_rows(example, expert, hidden_BTD, inputs, number=-(-weight // 1))
            wanted_CC += (x_NC.T @ x_NC).tril() * weight / len(x_NC)
        torch.testing.assert_close(extra_CC, wanted_CC, rtol=1e-3, atol=1e-4)


def _foreign_rows(
    example: _Example, expert: int, hidden_BTD: torch.Tensor, inputs: Any, number: float
) -> torch.Tensor:
    """What a down projection reads of evenly spaced rows; the expert itself is run on them."""
    experts: Any = example.block.get_submodule(example.experts)
    given: list[torch.Tensor] = []
    hook = experts.inputs.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    example.block(hidden_BTD, *inputs.args, **inputs.kwargs)
    hook.remove()
    count = len(given[0])
    places = [(place * count // int(number) + expert * count // 4) % count for place in range(int(number))]
    read: list[torch.Tensor] = []
    hook = experts.expert(expert).down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    experts._run(experts.expert(expert), given[0][places])
    hook.remove()
    return read[0].double()


@torch.inference_mode()
def test_all_experts_see_all_tokens_where_only_rows_besides_count(example):
    readers = _readers(example, extra_share=1.0, counts_own=False)
    found = example.observed(readers)
    pool = found.statistics.rows[8]
    for expert in range(4):
        assert found.statistics.rows[4 + expert] == min(pool, _ROWS * _POSITIONS)


@pytest.mark.parametrize("summed", [(0, 4), (5,), (8,)])
@torch.inference_mode()
def test_what_is_summed_changes_neither_sums_nor_what_exponents_come_from(example, summed):
    readers = _readers(example, extra_share=0.25)
    whole = example.observed(readers, wants_squares=True)
    part = example.observed(readers, summed=summed, wants_squares=True)
    assert set(part.statistics.grams) == set(summed)
    for number in summed:
        assert torch.equal(*(matrix_of(cell.statistics.grams[number]) for cell in (part, whole)))
    assert part.statistics.squares.keys() == whole.statistics.squares.keys() == set(range(8))
    for number, squares_C in part.statistics.squares.items():
        assert torch.equal(squares_C, whole.statistics.squares[number])
        diagonal_C = matrix_of(whole.statistics.grams[number]).diagonal()
        torch.testing.assert_close(squares_C, diagonal_C, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_sequence_that_is_not_finite_is_named_by_an_expert(example):
    hidden_BTD = example.hidden_BTD.clone()
    hidden_BTD[3, 2] = float("inf")
    spoilt = dataclasses.replace(example, hidden_BTD=hidden_BTD)
    only = {4: _readers(example, extra_share=0.25)[4], 8: _readers(example)[8]}
    assert spoilt.observed(only).left_out == {3}


@pytest.mark.parametrize("columns", [40, 300])
def test_share_of_a_pool_is_added_in_both_triangles(columns):
    generator = torch.Generator().manual_seed(columns)
    own_NC, pool_NC = (torch.randn(n, columns, generator=generator) for n in (50, 400))
    totals = []
    for x_NC in (own_NC, pool_NC[:250], pool_NC[250:]):
        partial = partial_of(x_NC)
        total = Total.zeros(columns, exponent_for(1000.0, 2))
        total.add_(partial.panels)
        totals.append(total)
    found_CC = matrix_from(totals[:1])
    add_totals_(found_CC, totals[1:], share=0.1)
    own, pool = own_NC.double(), pool_NC.double()
    wanted_CC = own.T @ own + 0.1 * pool.T @ pool
    torch.testing.assert_close(found_CC.double(), wanted_CC, rtol=1e-5, atol=1e-4)
    assert torch.equal(found_CC, found_CC.T)
