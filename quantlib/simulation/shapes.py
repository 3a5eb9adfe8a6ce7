"""A model as sizes: what each block's linears read, how many weights they have, how many bytes move.

Made from a plan, which knows a real checkpoint, or from the values of a ``config.json`` alone
(`config_shapes`), so that a model nobody has downloaded can be predicted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.checkpoint.layout import layout_shard
from quantlib.job.alike_groups import Likeness, likenesses
from quantlib.job.expert_groups import token_shares
from quantlib.job.group_tiles import group_tiles
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.row_tiles import tile_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """Linears that read the same tensor and are quantized with one factor.

    Attributes:
        columns: In features.
        tiles: Rows of its row tiles: out features of all linears.
        token_share: Share of the tokens that they see: of an expert, the part routed to it.
        likeness: What it shares with others of a block that may be solved along with it.
    """

    columns: int
    tiles: tuple[int, ...]
    token_share: float = 1.0
    likeness: Likeness | None = None

    @property
    def rows(self) -> int:
        """Out features of its linears."""
        return sum(self.tiles)

    @property
    def weights(self) -> int:
        """Weights of its linears."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One decoder block.

    Attributes:
        groups: Its input groups that calibrate.
        other_weights: Weights of linears that do not: kept, or rounded without data.
        attention_width: Heads times the mean of a query's and a value's size.
        source_bytes: Of all its tensors, stored.
        output_bytes: Of its shard.
    """

    groups: tuple[GroupShape, ...]
    other_weights: int
    attention_width: float
    source_bytes: int
    output_bytes: int

    @property
    def passed_weights(self) -> float:
        """Weights that a token meets on its way through, on average."""
        return self.other_weights + sum(group.weights * group.token_share for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A whole model.

    Attributes:
        name: For people.
        blocks: In order.
        hidden: Features of an activation between blocks.
        vocabulary: Tokens.
        prelude_bytes: Of what stands before the blocks, stored; it is copied.
        tail_bytes: Of what stands after them and is written there.
    """

    name: str
    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    prelude_bytes: int
    tail_bytes: int

    @property
    def source_bytes(self) -> int:
        """Of the whole checkpoint."""
        return self.prelude_bytes + self.tail_bytes + sum(block.source_bytes for block in self.blocks)

    @property
    def output_bytes(self) -> int:
        """Of what is written."""
        return self.prelude_bytes + self.tail_bytes + sum(block.output_bytes for block in self.blocks)


def shape_of_plan(
    plan: Plan, config: Mapping[str, Any], tensor_bytes: Mapping[str, int], device_type: str = "cuda"
) -> ModelShape:
    """The sizes of a planned job.

    Args:
        config: Values of the source's ``config.json``.
        tensor_bytes: Source tensor -> its bytes.
        device_type: Of the workers, whatever planned: it decides the row tiles.
    """
    width = attention_width(config)
    units = plan.block_units
    copied = {"prelude": 0, "tail": 0}
    for unit in plan.units:
        if unit.block is None:
            copied[unit.stage] += _bytes_of(unit)
    return ModelShape(
        name=plan.source,
        blocks=tuple(
            _block_shape(
                plan,
                block,
                units[block.index],
                width,
                sum(tensor_bytes[n] for n in block.tensors),
                device_type,
            )
            for block in plan.blocks
        ),
        hidden=config["hidden_size"],
        vocabulary=config["vocab_size"],
        prelude_bytes=copied["prelude"],
        tail_bytes=copied["tail"],
    )


def attention_width(config: Mapping[str, Any]) -> float:
    """Heads times the mean size of a query and a value, from which the cost of attention follows.

    >>> attention_width({"hidden_size": 8192, "num_attention_heads": 64})
    8192.0
    >>> attention_width({"num_attention_heads": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    ...                  "v_head_dim": 128})
    20480.0
    """
    heads = config["num_attention_heads"]
    if "qk_nope_head_dim" in config:
        sizes = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
        return heads * sizes / 2
    return float(heads * head_size(config))


def head_size(config: Mapping[str, Any]) -> int:
    """Features of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _block_shape(
    plan: Plan, block: BlockPlan, unit: UnitPlan, width: float, source_bytes: int, device_type: str
) -> BlockShape:
    linears = {linear.name: linear for linear in block.linears}
    shares = token_shares(plan, block)
    all_tiles = group_tiles(block, device_type)
    alike = likenesses(block, all_tiles, device_type)
    calibrated = {
        group: [tile.runs for tile in tiles if linears[tile.runs[0].name].method == "gptq"]
        for group, tiles in all_tiles.items()
    }
    groups = tuple(
        GroupShape(
            columns=linears[tiles[0][0].name].columns,
            tiles=tuple(map(tile_rows, tiles)),
            token_share=shares[tiles[0][0].name],
            likeness=alike.get(group),
        )
        for group, tiles in calibrated.items()
        if tiles
    )
    weights = sum(linear.rows * linear.columns for linear in block.linears)
    return BlockShape(
        groups=groups,
        other_weights=weights - sum(group.weights for group in groups),
        attention_width=width,
        source_bytes=source_bytes,
        output_bytes=_bytes_of(unit),
    )


def _bytes_of(unit: UnitPlan) -> int:
    return layout_shard(unit.tensors).size_bytes
