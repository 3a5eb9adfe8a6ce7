"""Sizes of a model from its ``config.json`` alone, without weights and without transformers.

For models whose configuration is shipped (`SHIPPED`), so that a prediction needs neither network nor a
checkpoint, also of one that the product does not convert yet. Two kinds of blocks are known: dense ones like
Llama's, and DeepSeek-V3's (latent attention, a shared expert, routed experts after some dense blocks).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlib.errors import RecipeError
from quantlib.grids.formats import DIVIDED_SCALES, FULL_SCALES, NESTED_SCALES, POWER_SCALES
from quantlib.job.alike_groups import Likeness
from quantlib.job.options import JobOptions
from quantlib.row_tiles import batch_size, row_tiles, tile_height, tile_rows
from quantlib.schemes import WeightScheme, scheme_from_name
from quantlib.simulation.shapes import BlockShape, GroupShape, ModelShape, attention_width, head_size

_FOLDER = Path(__file__).parent / "configs"
SHIPPED = ("llama-3.1-70b", "llama-3.1-405b", "deepseek-v3")
PREFIX = "shapes:"
# bf16: of stored weights, and of the scales beside the codes.
_STORED_BYTES = 2
_SCALE_BYTES = {POWER_SCALES: 1, DIVIDED_SCALES: 1, NESTED_SCALES: 1, FULL_SCALES: 4}


def is_shipped(source: str) -> bool:
    """Whether an address names a shipped configuration instead of a checkpoint."""
    return source.startswith(PREFIX)


def shipped_shape(options: JobOptions) -> ModelShape:
    """The sizes of a shipped model, all linears of its blocks quantized in one scheme.

    Args:
        options: Their source is ``shapes:llama-3.1-405b``.

    Raises:
        RecipeError: No such name; or rules, a method without calibration, or a target, which is checked
            against the linears of a checkpoint.
    """
    name = options.source.removeprefix(PREFIX)
    if name not in SHIPPED:
        raise RecipeError(
            f"there are no shapes of {name!r}; shipped are {', '.join(PREFIX + known for known in SHIPPED)}",
            option="source",
        )
    unknown = ["rules"] * bool(options.rules)
    unknown += [f"method {options.method}"] * (options.method != "gptq")
    unknown += [f"target {options.target}"] * (options.target is not None)
    if unknown:
        raise RecipeError(
            f"{options.source} is predicted for gptq with one scheme, found {unknown[0]}; leave it out, or"
            " name a checkpoint",
            option=unknown[0].partition(" ")[0],
        )
    return shape_of_config(name, shipped_config(name), scheme_from_name(options.scheme, options.group_size))


def shipped_config(name: str) -> dict[str, Any]:
    """The fields of a ``config.json`` that decide sizes."""
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def shape_of_config(name: str, config: Mapping[str, Any], scheme: WeightScheme) -> ModelShape:
    """The sizes of a model stored in bf16.

    Args:
        config: Values of ``config.json``; ``model_type`` llama or deepseek_v3.
        scheme: Of all linears of the blocks; a router is kept.
    """
    kinds = {"llama": _llama_blocks, "deepseek_v3": _deepseek_blocks}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    embedding = hidden * vocabulary
    head = 0 if config["tie_word_embeddings"] else embedding
    width = attention_width(config)
    kinds_of_blocks = kinds[config["model_type"]](config)
    made = {kind: _block(kind, width, scheme) for kind in set(kinds_of_blocks)}
    return ModelShape(
        name=name,
        blocks=tuple(made[kind] for kind in kinds_of_blocks),
        hidden=hidden,
        vocabulary=vocabulary,
        prelude_bytes=embedding * _STORED_BYTES,
        tail_bytes=(head + hidden) * _STORED_BYTES,
    )


# Input groups; weights of linears that are kept; other parameters: norms, a router's bias.
_Parts = tuple[tuple[GroupShape, ...], int, int]


def _llama_blocks(config: Mapping[str, Any]) -> list[_Parts]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], head_size(config)
    queries = config["num_attention_heads"] * size
    keys = config["num_key_value_heads"] * size
    groups = (
        _group(hidden, queries, keys, keys),
        _group(queries, hidden),
        *_gated(hidden, inner),
    )
    return [(groups, 0, 2 * hidden)] * config["num_hidden_layers"]


def _deepseek_blocks(config: Mapping[str, Any]) -> list[_Parts]:
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    attention = (
        _group(hidden, q_rank, kv_rank + rope),
        _group(q_rank, heads * (nope + rope)),
        _group(kv_rank, heads * (nope + value)),
        _group(heads * value, hidden),
    )
    norms = 2 * hidden + q_rank + kv_rank
    inner = config["moe_intermediate_size"]
    shared = _gated(hidden, inner * config["n_shared_experts"])
    routed = _gated(hidden, inner, token_share=config["num_experts_per_tok"] / experts) * experts
    dense = ((*attention, *_gated(hidden, config["intermediate_size"])), 0, norms)
    sparse = ((*attention, *shared, *routed), experts * hidden, norms + experts)
    num_dense = config["first_k_dense_replace"]
    return [dense] * num_dense + [sparse] * (config["num_hidden_layers"] - num_dense)


def _gated(hidden: int, inner: int, token_share: float = 1.0) -> tuple[GroupShape, ...]:
    """Gate and up, which read the same, and down."""
    return (
        _group(hidden, inner, inner, token_share=token_share),
        _group(inner, hidden, token_share=token_share),
    )


def _group(columns: int, *rows: int, token_share: float = 1.0) -> GroupShape:
    """Linears of so many rows that read the same, in the row tiles of a GPU."""
    linears = {str(number): count for number, count in enumerate(rows)}
    tiles = row_tiles(linears, tile_height(columns, "cuda"))
    most = batch_size(sum(rows), columns, "cuda") if len(tiles) == 1 else 1
    # Of one method and scheme are all.
    likeness = Likeness(None, None, rows, columns, most) if most > 1 else None
    return GroupShape(
        columns=columns, tiles=tuple(map(tile_rows, tiles)), token_share=token_share, likeness=likeness
    )


def _block(parts: _Parts, width: float, scheme: WeightScheme) -> BlockShape:
    groups, kept_weights, others = parts
    weights = sum(group.weights for group in groups)
    return BlockShape(
        groups=groups,
        other_weights=kept_weights,
        attention_width=width,
        source_bytes=(weights + kept_weights + others) * _STORED_BYTES,
        output_bytes=sum(_packed_bytes(group, scheme) for group in groups)
        + (kept_weights + others) * _STORED_BYTES,
    )


def _packed_bytes(group: GroupShape, scheme: WeightScheme) -> int:
    num_scales = group.rows * scheme.num_groups(group.columns) // scheme.block_rows
    zero_bits = 0 if scheme.is_symmetric else scheme.bits
    scale_bytes = _SCALE_BYTES.get(scheme.scales, _STORED_BYTES)
    return (group.weights * scheme.bits + num_scales * zero_bits) // 8 + num_scales * scale_bytes
