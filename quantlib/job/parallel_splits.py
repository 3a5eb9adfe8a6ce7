"""How engines split a linear between the devices that share a matrix (tensor parallelism).

transformers says it for many families, in ``base_model_tp_plan`` of a configuration: ``colwise`` splits out
features, ``rowwise`` in features. Its other styles gather or split activations around a matrix in ways of its
own, which engines need not share, so these linears are known by their names, as all are where it says
nothing. Projections to attention heads are split by heads, and those of keys and values are repeated where
there are fewer heads than devices.
"""

import re
from collections.abc import Mapping

OUT, IN, HEADS = "out", "in", "heads"

_STYLES = {"colwise": OUT, "rowwise": IN}
_TO_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
_NAMES = {
    OUT: (
        *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
        *("fc1", "fc_in", "c_fc", "dense_h_to_4h"),
        # Latent attention: of its two factors the second has the heads, and all rows of each.
        *("q_b_proj", "kv_b_proj"),
    ),
    IN: ("o_proj", "out_proj", "down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "dense", "w2"),
}
_BY_NAME = {name: split for split, names in _NAMES.items() for name in names}
# "layers.*.mlp.down_proj": what stands before the number of the block is the same for all.
_IN_BLOCK = re.compile(r"[^*]*\.\*\.(.+)")


def split_styles(tp_plan: Mapping[str, str]) -> dict[str, str]:
    """transformers' plan of a model as one of a block.

    Args:
        tp_plan: ``base_model_tp_plan``: path in the model, ``*`` for a number -> style.

    Returns:
        Path inside the block -> style.

    >>> split_styles({"layers.*.mlp.fc1": "colwise", "norm": "replicated"})
    {'mlp.fc1': 'colwise'}
    """
    return {found[1]: style for place, style in tp_plan.items() if (found := _IN_BLOCK.fullmatch(place))}


def split_of(path: str, styles: Mapping[str, str], *, is_expert: bool = False) -> str | None:
    """Which side of a linear is split.

    Args:
        path: Of the module, inside the block.
        styles: What `split_styles` found.
        is_expert: Whether it belongs to routed experts; transformers' styles of those are about tensors of
            all experts, some of them transposed.

    Returns:
        `OUT` (out features, column-parallel), `IN` (in features, row-parallel) or `HEADS` (out features by
        whole heads); None where every device has all of it, or where nothing tells.

    >>> split_of("mlp.ffn", {"mlp.ffn": "colwise"}), split_of("mlp.ffn", {})
    ('out', None)
    """
    name = path.rpartition(".")[2]
    if name in _TO_HEADS:
        return HEADS
    style = None if is_expert else styles.get(re.sub(r"\.\d+\.", ".*.", path))
    return _STYLES.get(style or "", _BY_NAME.get(name))
