"""Weights that are made while a linear runs: the same bits, and no weight before or after."""

import gc
import weakref

import pytest
import torch
from torch import nn

from quantlib.errors import CheckpointError
from quantlib.model.late_weights import LateWeight, put_late_, run_in_parts_, stored_weight
from quantlib.panels import WEIGHT_ROWS


class _Block(nn.Module):
    def __init__(self, rows: int, *, has_bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(8, rows, bias=has_bias)
        self.down = nn.Linear(rows, 8, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _stored(block: _Block) -> dict[str, torch.Tensor]:
    return {"up": block.up.weight.data.bfloat16(), "down": block.down.weight.data.bfloat16()}


@pytest.mark.parametrize("rows", [12, WEIGHT_ROWS, WEIGHT_ROWS + 1, 2 * WEIGHT_ROWS + 100])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_late_weights_give_the_bits_of_live_ones_and_the_product(rows: int, has_bias: bool):
    torch.manual_seed(rows)
    live, late, x = _Block(rows, has_bias=has_bias), _Block(rows, has_bias=has_bias), torch.randn(2, 5, 8)
    late.load_state_dict(live.state_dict())
    stored = _stored(live)
    live.up.weight.data, live.down.weight.data = stored["up"].float(), stored["down"].float()
    wanted = live(x)
    run_in_parts_(live)
    given = {path: stored_weight(weight) for path, weight in stored.items()}
    put_late_(late, given, dtype=torch.float32, device="cpu")
    assert all(weight.is_meta for name, weight in late.named_parameters() if name.endswith("weight"))
    assert torch.equal(late(x), live(x))
    torch.testing.assert_close(late(x), wanted)


@torch.inference_mode()
def test_late_weight_is_begun_once_a_forward_and_made_by_runs_of_rows():
    block, asked = _Block(WEIGHT_ROWS + 10, has_bias=False), []
    weight_RC = block.up.weight.data.clone()

    def begin():
        asked.append("begin")
        return lambda rows: asked.append((rows.start, rows.stop)) or weight_RC[rows]

    late = LateWeight(shape=tuple(weight_RC.shape), begin=begin)
    put_late_(block, {"up": late}, dtype=torch.float32, device="cpu")
    block(torch.randn(3, 8))
    assert asked == ["begin", (0, WEIGHT_ROWS), (WEIGHT_ROWS, WEIGHT_ROWS + 10)]


@torch.inference_mode()
def test_weights_go_with_their_block_and_do_not_wait_for_the_garbage_collector():
    block = _Block(WEIGHT_ROWS + 10, has_bias=False)
    run_in_parts_(block)
    late = stored_weight(torch.zeros(8, WEIGHT_ROWS + 10))
    put_late_(block, {"down": late}, dtype=torch.float32, device="cpu")
    block(torch.randn(3, 8))
    weights = [weakref.ref(linear.weight) for linear in (block.up, block.down)]
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        del block
        assert [weight() for weight in weights] == [None, None]
    finally:
        if is_enabled:
            gc.enable()


def test_late_weight_of_another_shape_is_refused():
    given = {"up": stored_weight(torch.zeros(3, 8))}
    with pytest.raises(CheckpointError, match=r"\[3, 8\].*\[12, 8\]"):
        put_late_(_Block(12, has_bias=False), given, dtype=torch.float32, device="cpu")
