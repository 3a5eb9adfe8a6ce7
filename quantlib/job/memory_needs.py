"""What the stages of a block take on one worker, in bytes, from shapes alone.

R rows (out features), C columns (in features).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantlib.checkpoint.header import DTYPE_BYTES
from quantlib.checkpoint.layout import spec_bytes
from quantlib.job.activations import CALIBRATION, EVALUATION, cells_of
from quantlib.job.group_tiles import group_tiles
from quantlib.job.plan import BlockPlan, LinearPlan, Plan
from quantlib.row_tiles import device_type_of, tile_height, tile_rows

_WIDE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Hidden states, and outputs of the widest linears, that a forward holds at a time.
_HIDDEN_COPIES, _WIDEST_COPIES = 4, 4
# A solve holds a row tile in fp32 and so many buffers of its size; a factor takes a little more than its size
# while it is made.
_TILE_BUFFERS, _FACTOR_SIZES = 3, 1.3


@dataclass(frozen=True, slots=True)
class GroupNeeds:
    """Of one input group.

    Attributes:
        total: Exact sums over cells.
        partial: What one cell adds to them.
        solve: Hessian, factor, a row tile in fp32 with its buffers, and codes.
        codes: On their way to whoever packs; 0 of a group that is one tile.
    """

    total: int
    partial: int
    solve: int
    codes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeeds:
    """Of one block.

    Attributes:
        source: Tensors as they are stored.
        live: Weights in the dtype of the streams.
        levels: Dequantized weights, from which a block is made live as it was packed.
        packed: Tensors that take the place of source tensors in the shard.
        groups: Of its input groups.
    """

    source: int
    live: int
    levels: int
    packed: int
    groups: tuple[GroupNeeds, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellNeeds:
    """Of the cells.

    Attributes:
        streams: All streams of a worker's share of the cells.
        working: What a forward of one cell takes.
    """

    streams: int
    working: int


def block_needs(plan: Plan, block: BlockPlan) -> BlockNeeds:
    """What a block takes; the dtype in which its linears are stored is taken from tensors beside them."""
    unit = plan.block_units[block.index]
    copied = [spec for spec in unit.tensors if spec.name in unit.copied]
    made = [spec for spec in unit.tensors if spec.name not in unit.copied]
    stored = max((DTYPE_BYTES[spec.dtype] for spec in copied), default=2)
    quantized = {linear.name: linear for linear in block.linears if linear.scheme is not None}
    tiles = group_tiles(block, device_type_of(plan.device_kind))
    elements = sum(linear.rows * linear.columns for linear in quantized.values())
    others = sum(math.prod(spec.shape) for spec in copied)
    return BlockNeeds(
        source=elements * stored + sum(spec_bytes(spec) for spec in copied),
        live=(elements + others) * _WIDE_BYTES[plan.compute_dtype],
        levels=elements * 4,
        packed=sum(spec_bytes(spec) for spec in made),
        groups=tuple(
            _group_needs(
                [quantized[name] for name in names],
                plan,
                [tile_rows(tile.runs) for tile in tiles[n]],
                is_centered=n in block.centered_groups,
            )
            for n, names in enumerate(block.input_groups)
        ),
    )


def cell_needs(plan: Plan, num_workers: int) -> CellNeeds:
    """What cells take on the worker that has most of them."""
    wide = _WIDE_BYTES[plan.compute_dtype]
    hidden = plan.blocks[0].linears[0].columns
    streams = {CALIBRATION: 1 + plan.options["correct_targets"], EVALUATION: 2}
    rows = {CALIBRATION: plan.options["sequences"], EVALUATION: plan.options["evaluation_sequences"]}
    share, tokens = 0, 0
    for corpus, keys in cells_of(plan).items():
        if keys:
            cell = min(rows[corpus], plan.sequences_per_cell) * plan.options["sequence_length"]
            tokens = max(tokens, cell)
            share += streams[corpus] * math.ceil(len(keys) / num_workers) * cell
    widest = max(linear.rows for block in plan.blocks for linear in block.linears)
    return CellNeeds(
        streams=share * hidden * wide,
        working=tokens * wide * (_HIDDEN_COPIES * hidden + _WIDEST_COPIES * widest),
    )


def _group_needs(
    linears: Sequence[LinearPlan], plan: Plan, tiles: Sequence[int], *, is_centered: bool
) -> GroupNeeds:
    """Of linears that are solved in tiles of so many rows."""
    columns, rows = linears[0].columns, sum(linear.rows for linear in linears)
    codes = rows * columns * (len(tiles) > 1)
    highest = min(max(tiles), tile_height(columns, device_type_of(plan.device_kind)))
    solve = (1 + _TILE_BUFFERS) * 4 * highest * columns + 2 * rows * columns
    if is_centered:
        # The weights once more in fp32, from which a bias is found.
        solve += 4 * rows * columns
    if plan.calibration_digest is None:
        return GroupNeeds(total=0, partial=0, solve=solve, codes=codes)
    square = (columns + is_centered) ** 2
    panel = 128 * max(1, math.ceil(columns / 2048)) * columns
    crosses: bool = plan.options["correct_targets"]
    return GroupNeeds(
        # int64: of X^T X a little more than the lower triangle, of X_ref^T X all.
        total=4 * (square + panel) + 8 * square * crosses,
        partial=4 * square * (1 + crosses),
        # Corrected targets need a factor of their own, and the product that they are corrected by.
        solve=solve + int((1 + _FACTOR_SIZES) * 4 * square) + 8 * square * crosses,
        codes=codes,
    )
