"""A skeleton can be loaded from the names of linears that were parts of fused tensors."""

import pytest

from quantlib.errors import CheckpointError
from quantlib.model.rejoined_names import rejoined_names
from quantlib.model.skeleton import Skeleton, load_skeleton
from tests.support.tiny_models import read_all_tensors, read_config, save_tiny_checkpoint

_FUSED = (
    "aria_text",
    "dbrx",
    "gemma4_text",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "llama4",
    "llama4_text",
    "qwen3_vl_moe",
)
_NOT_FUSED = ("gpt2", "llama", "mixtral", "deepseek_v3", "minimax_m2")


def _linears(skeleton: Skeleton):
    return [linear for index in range(skeleton.num_blocks) for linear in skeleton.block_spec(index).linears]


def _names_of_output(names: list[str], skeleton: Skeleton) -> list[str]:
    """What a quantized checkpoint decodes to: every linear by itself, and all that belongs to none."""
    linears = _linears(skeleton)
    taken = {name for linear in linears for name in linear.weight_tensors}
    taken |= {linear.bias.tensor for linear in linears if linear.bias is not None}
    weights = [f"{linear.name}.weight" for linear in linears]
    biases = [f"{linear.name}.bias" for linear in linears if linear.bias is not None]
    return [name for name in names if name not in taken] + weights + biases


def _stored(folder, family):
    source = save_tiny_checkpoint(folder, family)
    return read_config(source), list(read_all_tensors(source))


def _assert_alike(skeleton: Skeleton, original: Skeleton) -> None:
    for index in range(original.num_blocks):
        found, wanted = skeleton.block_spec(index), original.block_spec(index)
        assert found.input_groups == wanted.input_groups
        places = [[(x.name, x.path, x.rows, x.columns) for x in spec.linears] for spec in (found, wanted)]
        assert places[0] == places[1]
    assert skeleton.prelude_tensors == original.prelude_tensors
    assert skeleton.tail_tensors == original.tail_tensors


@pytest.mark.parametrize("family", [*_FUSED, *_NOT_FUSED])
def test_output_has_the_blocks_of_its_source(family, tmp_path):
    config, names = _stored(tmp_path, family)
    original = load_skeleton(config, names)
    written = _names_of_output(names, original)
    rejoined = rejoined_names(config, written)
    _assert_alike(load_skeleton(config, rejoined), original)
    assert rejoined[: len(written)] == tuple(written)
    assert (len(rejoined) > len(written)) == (family in _FUSED)
    assert rejoined_names(config, names) == tuple(names)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_names_without_the_prefix_of_the_base_model_are_found(family, tmp_path):
    config, names = _stored(tmp_path, family)
    names = [name.removeprefix("model.") for name in names]
    original = load_skeleton(config, names)
    rejoined = rejoined_names(config, _names_of_output(names, original))
    _assert_alike(load_skeleton(config, rejoined), original)
    assert original.block_spec(0).prefix == "layers.0"


def test_block_without_any_expert_is_still_incomplete(tmp_path):
    config, names = _stored(tmp_path, "gpt_oss")
    written = _names_of_output(names, load_skeleton(config, names))
    written = [name for name in written if not name.startswith("model.layers.2.mlp.experts.")]
    with pytest.raises(CheckpointError, match=r"needs tensor model\.layers\.2\.mlp\.experts\."):
        load_skeleton(config, rejoined_names(config, written))
