"""What a traced forward tells apart, on small hand-made models."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.errors import UnsupportedModelError
from quantlib.model.block_spec import describe_block
from quantlib.model.meta_model import compute_buffers, find_blocks
from quantlib.model.sources import Sources
from quantlib.model.trace import trace_forward

_WIDTH = 8


class _Block(nn.Module):
    """Three linears; ``wiring`` says how they are called."""

    def __init__(self, wiring: Callable[["_Block", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self._wiring = wiring

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return self._wiring(self, hidden_states)


def _all_three(block: _Block, x: torch.Tensor) -> torch.Tensor:
    return block.a(x) + block.b(x) + block.c(x)


class _Model(nn.Module):
    """Two blocks between an embedding and a head, with the parts of transformers' interface that are read."""

    def __init__(self, wiring: Callable[[_Block, torch.Tensor], torch.Tensor], order: list[Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, model_type="toy")
        self.config.get_text_config = lambda decoder: self.config
        self.embedding = nn.Embedding(5, _WIDTH)
        self.layers = nn.ModuleList(_Block(wiring) for _ in range(2))
        self.middle = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, 5)
        self._order = order

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for step in self._order:
            if callable(step):
                hidden = step(self, hidden)
            else:
                hidden = self.layers[step](hidden) if isinstance(step, int) else self.middle(hidden)
        return self.head(hidden)


def _trace(
    wiring: Callable[[_Block, torch.Tensor], torch.Tensor], order: list[Any] | None = None
) -> tuple[Any, Any]:
    with torch.device("meta"):
        model: Any = _Model(wiring, [0, 1] if order is None else order).requires_grad_(False)
    path, blocks = find_blocks(model)
    return blocks[0], trace_forward(model, path)


def _sources(block: nn.Module) -> Sources:
    """Where the tensors of a block that is stored under its own names come from."""
    model: Any = nn.Module()
    model.layers = nn.ModuleList([block])
    model.base_model_prefix, model.config = "model", SimpleNamespace(model_type="toy")
    return Sources(model, model.state_dict())


def _groups(wiring: Callable[[_Block, torch.Tensor], torch.Tensor]) -> list[list[str]]:
    return list(_trace(wiring)[1].blocks[0].groups.values())


def test_same_tensor_and_reshaped_views_are_one_group() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, _WIDTH)
        return block.c(x) + block.a(flat).view_as(x) + block.b(flat.view(1, -1, _WIDTH))

    assert _groups(wiring) == [["c", "a", "b"]]


def test_equal_looking_tensors_are_separate_groups() -> None:
    assert _groups(lambda block, x: block.a(x) + block.b(x.clone()) + block.c(x + 0)) == [["a"], ["b"], ["c"]]


def test_disjoint_slices_of_one_tensor_are_separate_groups() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.cat([x, x], dim=-1).chunk(2, dim=-1)
        return block.a(left) + block.b(right) + block.c(left)

    assert _groups(wiring) == [["a", "c"], ["b"]]


def test_tensor_changed_in_place_starts_a_new_group() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        first = block.a(y)
        y.mul_(2)
        return first + block.b(y) + block.c(y)

    assert _groups(wiring) == [["a"], ["b", "c"]]


def test_input_passed_by_keyword_is_seen() -> None:
    assert _groups(lambda block, x: block.a(input=x) + block.b(x) + block.c(x)) == [["a", "b", "c"]]


def test_branch_on_a_value_does_not_stop_the_trace() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        scale = 2.0 if x.abs().max() > 1 else 1.0
        return block.a(x * scale) + block.b(x) + block.c(x)

    assert _groups(wiring) == [["a"], ["b", "c"]]


def test_linear_that_is_not_called_is_refused_by_name() -> None:
    block, trace = _trace(lambda block, x: block.a(x) + nn.functional.linear(x, block.b.weight) + block.c(x))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.b: the linear is not called"):
        sources = _sources(block)
        describe_block("layers.0", block, trace.blocks[0], sources.slots(block, "layers.0"), sources)


def _reads_block_0(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    model.kept = hidden
    return hidden


def test_hidden_state_changed_between_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="the hidden state changes before decoder block 1"):
        _trace(_all_three, [0, lambda model, hidden: hidden * 2, 1])


def test_block_that_is_handed_what_an_earlier_one_made_is_refused() -> None:
    def second(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.layers[1](hidden, earlier=hidden.mean(-1))

    with pytest.raises(UnsupportedModelError, match="block 1 is handed more than the hidden state"):
        _trace(_all_three, [0, second])


def test_tail_that_reads_what_an_earlier_block_made_is_refused() -> None:
    def add_kept(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + model.kept

    with pytest.raises(UnsupportedModelError, match="reads what earlier ones made"):
        _trace(_all_three, [0, _reads_block_0, 1, add_kept])


def test_linear_called_twice_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="a of block 0 runs twice"):
        _trace(lambda block, x: block.a(block.a(x)) + block.b(x) + block.c(x))


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ([1, 0], "block 1 runs out of order"),
        ([0, 0, 1], "block 0 runs out of order or twice"),
        ([0, "middle", 1], "middle runs between decoder blocks"),
        ([0], "head runs between decoder blocks"),
    ],
)
def test_blocks_that_do_not_follow_each_other_are_refused(order: list[Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        _trace(lambda block, x: block.a(x) + block.b(x) + block.c(x), order)


def test_modules_around_the_blocks_are_told_apart_by_when_they_run() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        return block.a(x) + block.b(x) + block.c(x)

    _, trace = _trace(wiring, ["middle", 0, 1])
    assert (trace.prelude, trace.tail) == (["embedding", "middle"], ["head"])
    _, trace = _trace(wiring, [0, 1, "middle"])
    assert (trace.prelude, trace.tail) == (["embedding"], ["middle", "head"])


def test_trace_leaves_the_model_as_it_was() -> None:
    def wiring(block: _Block, x: torch.Tensor) -> torch.Tensor:
        block.remembered = x
        return block.a(x) + block.b(x) + block.c(x)

    block, _ = _trace(wiring)
    assert not hasattr(block, "remembered")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())


def test_blocks_are_the_list_as_long_as_the_config_says() -> None:
    model: Any = _Model(lambda block, x: x, [])
    model.more = nn.ModuleList(nn.Identity() for _ in range(3))
    assert find_blocks(model) == ("layers", model.layers)
    model.config.num_hidden_layers = 3
    assert find_blocks(model) == ("more", model.more)
    model.config.num_hidden_layers = 4
    with pytest.raises(UnsupportedModelError, match="one list of 4 decoder blocks in the model, found none"):
        find_blocks(model)


def test_two_lists_that_could_be_the_blocks_are_refused() -> None:
    model: Any = _Model(lambda block, x: x, [])
    model.more = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(
        UnsupportedModelError, match="one list of 2 decoder blocks in the model, found layers, more"
    ):
        find_blocks(model)


@pytest.mark.parametrize("buffer", [torch.ones(3, device="meta"), torch.arange(3, device="meta")])
def test_buffer_that_transformers_cannot_compute_is_refused_by_name(buffer: torch.Tensor) -> None:
    model = _model_with_buffer(buffer, lambda module: None)
    with pytest.raises(UnsupportedModelError, match=r"buffer rotary\.frequencies is not stored"):
        compute_buffers(model)


def test_buffer_that_the_model_above_computes_has_its_value_and_the_model_stays_meta() -> None:
    def init(module: nn.Module) -> None:
        if hasattr(module, "rotary"):
            module.rotary.frequencies.copy_(torch.tensor([1, 2, 4]))

    model = _model_with_buffer(torch.arange(3, device="meta"), init)
    assert compute_buffers(model)["rotary", "frequencies"].tolist() == [1, 2, 4]
    assert model.rotary.frequencies.is_meta


def _model_with_buffer(buffer: torch.Tensor, init: Callable[[nn.Module], None]) -> Any:
    model: Any = nn.Module()
    model.rotary = nn.Module()
    model.rotary.register_buffer("frequencies", buffer, persistent=False)
    model._init_weights = init
    return model
