"""Routed experts as linears: their names, what they read, which tokens they see."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.errors import CheckpointError
from quantlib.model.experts import Experts, all_tokens_to_all_experts
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
def _rows_seen(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Path of every linear of an expert -> the rows it was called with."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path, experts in block.named_modules():
        if not isinstance(experts, Experts):
            continue
        for name, linear in experts.named_modules():
            if isinstance(linear, nn.Linear):

                def note(_: Any, args: Any, name: str = f"{path}.{name}") -> None:
                    assert name not in seen
                    seen[name] = args[0]

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
    with all_tokens_to_all_experts(block), _rows_seen(block) as everything:
        output = run_block(block, hidden_BTD, inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    chosen_by_each = 2
    rows_of_downs = [len(rows) for name, rows in routed.items() if name.endswith("down_proj")]
    assert sum(rows_of_downs) == chosen_by_each * 22
    assert len(everything) == 12
    assert {len(rows) for rows in everything.values()} == {22}
    assert not any(module.sends_all_tokens for module in block.modules() if isinstance(module, Experts))


def test_all_experts_read_one_tensor_when_they_see_all_tokens(tmp_path: Path) -> None:
    skeleton, tensors = _parts(tmp_path, "mixtral")
    block, (hidden_BTD, inputs) = _block(skeleton, tensors), _inputs(skeleton, tensors)
    with all_tokens_to_all_experts(block), _rows_seen(block) as seen:
        run_block(block, hidden_BTD, inputs)
    gates = {id(rows) for name, rows in seen.items() if name.endswith(("gate_proj", "up_proj"))}
    assert len(gates) == 1


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
