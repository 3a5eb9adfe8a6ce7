"""Routed experts as linears: their names, what they read, which tokens they see."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.errors import CheckpointError
from quantlib.model.experts import Experts, extra_rows
from quantlib.model.skeleton import Skeleton, load_skeleton, run_block
from tests.support.family_settings import EXPERTS
from tests.support.tiny_models import read_all_tensors, read_config, save_tiny_checkpoint

# Name of the down projection of expert 3, and how many linears block 3 has for each expert.
_NAMES = {
    "mixtral": "model.layers.3.block_sparse_moe.experts.3.w2",
    "qwen3_moe": "model.layers.3.mlp.experts.3.down_proj",
    "deepseek_v3": "model.layers.3.mlp.experts.3.down_proj",
    "ernie4_5_moe": "model.layers.3.mlp.experts.3.down_proj",
    "phimoe": "model.layers.3.block_sparse_moe.experts.3.w2",
    "lfm2_moe": "model.layers.3.feed_forward.experts.3.w2",
    "nemotron_h": "backbone.layers.3.mixer.experts.3.down_proj",
    # Stored fused: the names follow the place of the module.
    "gpt_oss": "model.layers.3.mlp.experts.3.down_proj",
    "llama4": "language_model.model.layers.3.feed_forward.experts.3.down_proj",
    "granitemoe": "model.layers.3.block_sparse_moe.experts.3.down_proj",
    "dbrx": "transformer.blocks.3.ffn.experts.3.down_proj",
}
_FIRST = ("gate_proj", "up_proj")
_ROUTERS = ("gate", "router", "gate.wg", "router.layer", "router.proj", "shared_expert_gate")


def _parts(folder: Path, family: str) -> tuple[Skeleton, dict[str, torch.Tensor]]:
    save_tiny_checkpoint(folder, family)
    tensors = read_all_tensors(folder)
    return load_skeleton(read_config(folder), tensors), tensors


def _block(skeleton: Skeleton, tensors: dict[str, torch.Tensor], index: int = 3) -> Any:
    return skeleton.build_block(index, tensors, dtype=torch.float32, device="cpu")


def _inputs(skeleton: Skeleton, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    ids_BT = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(7))
    hidden_BTD, inputs = skeleton.build_outer(tensors, dtype=torch.float32, device="cpu").embed(ids_BT)
    return hidden_BTD, inputs[3]


@contextmanager
def _rows_seen(
    block: nn.Module, *, is_extra: bool = False
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Path of every linear of an expert -> the rows it was called with, and their tokens."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for path, experts in block.named_modules():
        if not isinstance(experts, Experts):
            continue
        for name, linear in experts.named_modules():
            if isinstance(linear, nn.Linear):

                def note(_: Any, args: Any, name: str = f"{path}.{name}", owner: Experts = experts) -> None:
                    if owner.is_extra == is_extra:
                        assert name not in seen and owner.tokens is not None
                        seen[name] = args[0], owner.tokens

                handles.append(linear.register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", _NAMES)
def test_linears_of_experts_have_the_names_of_the_file(family: str, tmp_path: Path) -> None:
    skeleton, _ = _parts(tmp_path, family)
    linears = [linear for linear in skeleton.block_spec(3).linears if linear.expert == 3]
    assert [linear.name for linear in linears][-1] == _NAMES[family]
    assert len(linears) == (2 if family == "nemotron_h" else 3)


@pytest.mark.parametrize("family", [*EXPERTS, "llama4", "qwen3_vl_moe"])
def test_every_weight_is_the_stored_part_that_the_spec_names(family: str, tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, family)
    spec, block = skeleton.block_spec(3), _block(skeleton, tensors)
    assert {linear.expert for linear in spec.linears} >= {0, 1, 2, 3}
    for linear in spec.linears:
        weight = block.get_submodule(linear.path).weight
        assert weight.shape == (linear.rows, linear.columns)
        if len(linear.weight_tensors) == 1 and linear.weight_view is not None:
            stored = tensors[linear.weight_tensors[0]]
            assert torch.equal(linear.weight_view.of(stored), weight)
        if linear.is_stored_as_is:
            assert weight.data_ptr() == tensors[f"{linear.name}.weight"].data_ptr()


@pytest.mark.parametrize("family", EXPERTS)
def test_routers_and_gates_are_kept_as_tensors(family: str, tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, family)
    spec = skeleton.block_spec(3)
    linears = {linear.path for linear in spec.linears}
    assert not any(path.endswith(tuple(f".{router}" for router in _ROUTERS)) for path in linears)
    # A router has one row an expert; so has a gate of attention heads, which is no router.
    outside_attention = [linear for linear in spec.linears if "att" not in linear.path]
    assert not any(linear.rows in (1, 4) for linear in outside_attention)
    read = {name for linear in spec.linears for name in linear.weight_tensors}
    assert any(tensors[name].shape[0] == 4 and tensors[name].ndim == 2 for name in {*spec.tensors} - read)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "dbrx"])
def test_expert_sees_the_tokens_that_chose_it(family: str, tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, family)
    block, (hidden_BTD, inputs) = _block(skeleton, tensors), _inputs(skeleton, tensors)
    with _rows_seen(block) as routed:
        expected = run_block(block, hidden_BTD, inputs)
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    given: list[torch.Tensor] = []
    hook = experts.inputs.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with extra_rows(experts, 5), _rows_seen(block, is_extra=True) as besides:
        assert torch.equal(run_block(block, hidden_BTD, inputs), expected)
    hook.remove()
    # Llama 4 hands each expert its tokens scaled: what all are given are as many rows.
    assert [len(rows) for rows in given] == [44 if family == "llama4_text" else 22]
    chosen_by_each = 2
    rows_of_downs = [len(rows) for name, (rows, _) in routed.items() if name.endswith("down_proj")]
    assert sum(rows_of_downs) == chosen_by_each * 22
    for name, (rows, tokens) in routed.items():
        assert len(tokens) == len(rows)
        if family != "llama4_text" and not name.endswith("down_proj"):
            assert torch.equal(rows, given[0][tokens])
    assert len(besides) == 12
    assert {len(rows) for rows, _ in besides.values()} == {5}
    for expert in range(4):
        gate, up = (next(v for n, v in besides.items() if n.endswith(f".{expert}.{p}")) for p in _FIRST)
        assert torch.equal(gate[0], up[0]) and len(gate[0].unique(dim=0)) == 5
    offsets = {tuple(tokens.tolist()) for name, (_, tokens) in besides.items() if name.endswith("up_proj")}
    assert len(offsets) == 4
    assert (experts.num_extra, experts.is_extra) == (0, False)


def test_experts_run_all_rows_besides_where_that_many_are_wanted(tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, "mixtral")
    block, (hidden_BTD, inputs) = _block(skeleton, tensors), _inputs(skeleton, tensors)
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    with extra_rows(experts, 1000), _rows_seen(block, is_extra=True) as seen:
        run_block(block, hidden_BTD, inputs)
    assert {tuple(tokens.tolist()) for _, tokens in seen.values()} == {tuple(range(22))}


def test_expert_that_no_token_chose_is_not_called(tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, "mixtral")
    gate = "model.layers.3.block_sparse_moe.gate.weight"
    # Equal logits for all but expert 0, and the hidden state is the same for every token.
    tensors[gate] = torch.zeros_like(tensors[gate])
    tensors[gate][0], tensors[gate][1] = 1.0, 0.5
    block, (hidden_BTD, inputs) = _block(skeleton, tensors), _inputs(skeleton, tensors)
    with _rows_seen(block) as seen:
        run_block(block, hidden_BTD[:, :1].abs().expand_as(hidden_BTD), inputs)
    assert 0 < len(seen) < 12


def test_missing_expert_is_named(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, "mixtral")
    names = set(read_all_tensors(tmp_path))
    names.remove("model.layers.2.block_sparse_moe.experts.1.w3.weight")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.gate_up_proj.*experts\.1\.w3"):
        load_skeleton(read_config(tmp_path), names)


def test_input_groups_pair_gate_and_up_of_each_expert(tmp_path: Path) -> None:
    skeleton, _ = _parts(tmp_path, "qwen3_moe")
    groups = skeleton.block_spec(1).input_groups
    prefix = "model.layers.1.mlp.experts"
    for expert in range(4):
        assert (f"{prefix}.{expert}.gate_proj", f"{prefix}.{expert}.up_proj") in groups
        assert (f"{prefix}.{expert}.down_proj",) in groups
