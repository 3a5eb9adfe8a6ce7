"""What the stages of a job take on one worker, in bytes, from shapes alone.

R rows (out features), C columns (in features).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantlib.checkpoint.header import DTYPE_BYTES
from quantlib.checkpoint.layout import spec_bytes
from quantlib.job.activations import CALIBRATION, EVALUATION, cells_of
from quantlib.job.alike_groups import Likeness, likenesses
from quantlib.job.bundle import Bundle
from quantlib.job.expert_groups import readers_of
from quantlib.job.group_tiles import group_tiles
from quantlib.job.plan import BlockPlan, LinearPlan, Plan, TensorSpec
from quantlib.panels import WEIGHT_ROWS, panel_shapes, strip_shapes
from quantlib.row_tiles import device_type_of, tile_height, tile_rows

_WIDE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Hidden states, and outputs of the widest linears, that a forward holds at a time.
_HIDDEN_COPIES, _WIDEST_COPIES = 4, 4
# Of a cell, on their way where some streams wait beside the device: two that are asked for next, and what the
# cell before has become.
_PASSING_STREAMS = 3
# fp32 logits held at a time while scoring: many rows make a fast product.
LOGITS_BYTES = 64 << 20
# What a client of S3 holds of a shard that it writes (quantlib/storage/README.md).
_WRITTEN_BYTES = 160 << 20
# What a process takes beyond tensors while it works: 2 MB after 24 blocks were measured, 17 MB after 400.
_RECORD_BYTES, _BLOCK_RECORD_BYTES = 4 << 20, 40 << 10
# Parts of a unit without data that are there at a time, and those of them that are being read; see
# `quantlib.unit_converter`.
_PARTS_AT_A_TIME, _PARTS_READ = 3, 2
# Of outputs that are made together the largest is there, and not the sum.
_ONE_AT_A_TIME = ("source", "live", "recast", "late", "levels", "unpacked")
# A code while it is unpacked: a byte, a copy of its word, and what one of several passes makes of it.
_CODE_BYTES = 2.5
# A solve holds a row tile in fp32 and so many buffers of its size; a factor takes a little more than its size
# while it is made.
_TILE_BUFFERS, _FACTOR_SIZES = 3, 1.3


@dataclass(frozen=True, slots=True)
class GroupNeeds:
    """Of one input group.

    Attributes:
        pool: Number of the pool that is summed beside it, which groups of experts share; None without one.
        total: Exact sums over cells.
        partial: What one cell adds to them.
        source: Weights as they are stored.
        solve: Hessian, factor, a row tile in fp32 with its buffers, and codes.
        codes: On their way to whoever packs; 0 of a group that is one tile.
        likeness: What it shares with groups that may be solved along with it; None if it is solved alone.
    """

    pool: int | None
    total: int
    partial: int
    source: int
    solve: int
    codes: int
    likeness: Likeness | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeeds:
    """Of one block.

    Attributes:
        source: Tensors as they are stored.
        decoding: What reading them takes beside them, where they are made from codes.
        live: Weights in the dtype of the streams.
        recast: Tensors of another dtype, from which a device makes them.
        late: The same where linears make their weights when they run: one run of rows at a time.
        levels: Dequantized weights, from which a block is made live as it was packed.
        unpacked: The codes of one linear, from which late weights are made as they were packed.
        packed: Tensors that take the place of source tensors in the shard.
        groups: Of its input groups.
    """

    source: int
    decoding: int
    live: int
    recast: int
    late: int
    levels: int
    unpacked: int
    packed: int
    groups: tuple[GroupNeeds, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellNeeds:
    """Of the cells.

    Attributes:
        streams: All streams of a worker's share of the cells.
        working: What a forward of one cell takes: its hidden states before and after, and one batch.
        passing: Streams on their way to the device and from it, where some have no room there.
        pinned: Bytes that are pinned for each byte of a stream that waits beside the device, at most.
    """

    streams: int
    working: int
    passing: int
    pinned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndNeeds:
    """Of what stands before the blocks, or after them.

    Attributes:
        source: Tensors as they are stored.
        decoding: What reading them takes beside them, where they are made from codes.
        live: Those that are run, in the dtype they are run in.
        working: Hidden states of a cell, and logits.
    """

    source: int
    decoding: int
    live: int
    working: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitNeeds:
    """Of a unit without data.

    Attributes:
        source: Parts of the source that are there at a time.
        decoding: What reading parts takes beside them, where they are made from codes.
        made: All that is written.
        solve: Of the input group that takes most.
    """

    source: int
    decoding: int
    made: int
    solve: int


def block_needs(plan: Plan, block: BlockPlan) -> BlockNeeds:
    """What a block takes; the dtype in which its linears are stored is taken from tensors beside them."""
    unit = plan.block_units[block.index]
    copied = [spec for spec in unit.tensors if spec.name in unit.copied]
    made = [spec for spec in unit.tensors if spec.name not in unit.copied]
    stored = max((DTYPE_BYTES[spec.dtype] for spec in copied), default=2)
    quantized = {linear.name: linear for linear in block.linears if linear.scheme is not None}
    device_type = device_type_of(plan.device_kind)
    tiles = group_tiles(block, device_type)
    alike = likenesses(block, tiles, device_type)
    pools = readers_of(plan, block).pools
    elements = sum(linear.rows * linear.columns for linear in quantized.values())
    others = sum(math.prod(spec.shape) for spec in copied)
    # Parts of other tensors are not made late.
    own = [linear for linear in block.linears if linear.weight.view is None]
    in_linears = sum(linear.rows * linear.columns for linear in own)
    wide = _WIDE_BYTES[plan.compute_dtype]
    return BlockNeeds(
        source=elements * stored + sum(spec_bytes(spec) for spec in copied),
        decoding=plan.decoding_bytes.get(unit.name, 0),
        live=(elements + others) * wide,
        recast=_recast_bytes(plan, quantized.values(), copied),
        late=(elements + others - in_linears) * wide
        + max((_late_bytes(linear, wide) for linear in own), default=0),
        # On a CPU they are the weights themselves where a block is run in fp32.
        levels=0 if wide == 4 and plan.device_kind.startswith("cpu") else elements * 4,
        unpacked=int(
            max((_CODE_BYTES * linear.rows * linear.columns for linear in quantized.values()), default=0)
        ),
        packed=sum(spec_bytes(spec) for spec in made),
        groups=tuple(
            _group_needs(
                [quantized[name] for name in names],
                plan,
                [tile_rows(tile.runs) for tile in tiles[n]],
                stored,
                is_centered=n in block.centered_groups,
                pool=pools.get(n),
                likeness=alike.get(n),
            )
            for n, names in enumerate(block.input_groups)
        ),
    )


def bundled_needs(bundle: Bundle, index: int) -> BlockNeeds:
    """What a block takes where several outputs are made of it: their codes are all there at a time."""
    shared = block_needs(bundle.shared, bundle.shared.blocks[index])
    if len(bundle.outputs) == 1:
        return shared
    each = [block_needs(plan, plan.blocks[index]) for plan in bundle.outputs]
    wanting: list[list[GroupNeeds]] = [[] for _ in shared.groups]
    for needs, sums in zip(each, bundle.sums, strict=True):
        for group, number in zip(needs.groups, sums[index], strict=True):
            wanting[number].append(group)
    return dataclasses.replace(
        shared,
        # What one copies another may quantize: only the plans themselves tell a block's size.
        **{name: max(getattr(needs, name) for needs in each) for name in _ONE_AT_A_TIME},
        packed=sum(needs.packed for needs in each),
        groups=tuple(
            dataclasses.replace(
                group,
                solve=max(other.solve for other in others),
                codes=sum(other.codes for other in others),
            )
            for group, others in zip(shared.groups, wanting, strict=True)
        ),
    )


def solve_bytes(groups: Sequence[GroupNeeds], *, has_batches: bool) -> int:
    """What the solve of some input groups takes that are there at a time, the largest piece alone.

    Args:
        has_batches: Whether groups that are alike are solved as one batch.
    """
    counts = Counter(group.likeness for group in groups)

    def together(group: GroupNeeds) -> int:
        if not has_batches or group.likeness is None:
            return 1
        return min(group.likeness.most, counts[group.likeness])

    return max((group.solve * together(group) for group in groups), default=0)


def cell_needs(plan: Plan, num_workers: int, num_outputs: int = 1) -> CellNeeds:
    """What cells take on the worker that has most of them."""
    wide = _WIDE_BYTES[plan.compute_dtype]
    hidden, length = plan.blocks[0].linears[0].columns, plan.options["sequence_length"]
    corrects: bool = plan.options["correct_targets"]
    streams = {CALIBRATION: 1 + corrects, EVALUATION: 1 + num_outputs}
    rows = {CALIBRATION: plan.options["sequences"], EVALUATION: plan.options["evaluation_sequences"]}
    share, cell, batch, pinned = 0, 0, 0, 1.0
    for corpus, keys in cells_of(plan).items():
        if keys:
            rows_of_cell = min(rows[corpus], plan.sequences_per_cell)
            cell = max(cell, rows_of_cell * length)
            batch = max(batch, min(rows_of_cell, plan.sequences_per_batch) * length)
            size = rows_of_cell * length * hidden * wide
            pinned = max(pinned, pinned_bytes(size) / size)
            share += streams[corpus] * math.ceil(len(keys) / num_workers) * rows_of_cell * length
    widest = max(linear.rows for block in plan.blocks for linear in block.linears)
    forward = batch * (_HIDDEN_COPIES * hidden + _WIDEST_COPIES * widest)
    # What all groups read in the reference stream is kept until they read the other one.
    forward += corrects * batch * max(_columns_read(block) for block in plan.blocks)
    return CellNeeds(
        streams=share * hidden * wide,
        working=wide * ((2 + 2 * corrects) * cell * hidden + forward),
        passing=min(share, _PASSING_STREAMS * cell) * hidden * wide,
        pinned=pinned,
    )


def pinned_bytes(num_bytes: int) -> int:
    """What PyTorch takes where so many bytes are pinned: the next power of two.

    >>> pinned_bytes(5), pinned_bytes(8)
    (8, 8)
    """
    return 1 << (num_bytes - 1).bit_length()


def _columns_read(block: BlockPlan) -> int:
    columns = {linear.name: linear.columns for linear in block.linears}
    return sum(columns[group[0]] for group in block.input_groups)


def prelude_needs(plan: Plan) -> EndNeeds:
    """What embedding takes, and the tensors that are written along with it."""
    return EndNeeds(
        source=_source_bytes(plan, "prelude", plan.prelude_tensors),
        decoding=_decoding_ends(plan),
        live=_num_live(plan, plan.prelude_tensors) * _WIDE_BYTES[plan.compute_dtype],
        working=2 * _cell_bytes(plan),
    )


def head_needs(plan: Plan) -> EndNeeds:
    """What scoring takes, if there is evaluation text, and the tensors that are written along with it."""
    decoding = _decoding_ends(plan)
    if plan.evaluation_digest is None:
        return EndNeeds(source=_source_bytes(plan, "tail", ()), decoding=decoding, live=0, working=0)
    specs = _specs(plan)
    vocabulary = max(specs[name].shape[0] for name in plan.tail_tensors)
    return EndNeeds(
        source=_source_bytes(plan, "tail", plan.tail_tensors),
        decoding=decoding,
        live=4 * _num_live(plan, plan.tail_tensors),
        working=2 * _cell_bytes(plan)
        + min(LOGITS_BYTES, 2 * 4 * vocabulary * plan.options["sequence_length"]),
    )


def unit_needs(plan: Plan) -> list[UnitNeeds]:
    """What units take that are converted without data, in order."""
    blocks = {block.index: block_needs(plan, block) for block in plan.blocks}
    found = []
    for unit in plan.units:
        made = sum(spec_bytes(spec) for spec in unit.tensors)
        decoding = _PARTS_READ * plan.decoding_bytes.get(unit.name, 0)
        if unit.block is None:
            # What is copied is written from where it was read to.
            source = sum(spec_bytes(matrix.weight) for matrix in unit.rounded)
            found.append(UnitNeeds(source=source, decoding=decoding, made=made, solve=0))
            continue
        block = blocks[unit.block]
        largest = sorted((group.source for group in block.groups), reverse=True)[:_PARTS_AT_A_TIME]
        solve = max((group.solve for group in block.groups), default=0)
        found.append(UnitNeeds(source=sum(largest), decoding=decoding, made=made, solve=solve))
    return found


def writing_needs(plan: Plan) -> int:
    """What a storage client holds of the shard that it writes; local files are written as they are."""
    largest = max(sum(spec_bytes(spec) for spec in unit.tensors) for unit in plan.units)
    return min(_WRITTEN_BYTES, largest) if plan.output.startswith("s3://") else 0


def records_needs(plan: Plan) -> int:
    """What a worker keeps of its work on every block, and what libraries keep for theirs."""
    return _RECORD_BYTES + _BLOCK_RECORD_BYTES * len(plan.blocks)


def _cell_bytes(plan: Plan) -> int:
    """Hidden states of one stream of a cell."""
    tokens = plan.sequences_per_cell * plan.options["sequence_length"]
    return tokens * plan.blocks[0].linears[0].columns * _WIDE_BYTES[plan.compute_dtype]


def _specs(plan: Plan) -> dict[str, TensorSpec]:
    """Of what is written, and of the source tensors of what is rounded outside the blocks."""
    written = {spec.name: spec for unit in plan.units for spec in unit.tensors}
    return written | {matrix.weight.name: matrix.weight for matrix in plan.rounded}


def _num_live(plan: Plan, names: Sequence[str]) -> int:
    """Values of some tensors; of those that are rounded with the levels that run beside them."""
    specs, rounded = _specs(plan), {matrix.weight.name for matrix in plan.rounded}
    return sum(math.prod(specs[name].shape) * (1 + (name in rounded)) for name in names)


def _decoding_ends(plan: Plan) -> int:
    """Before the blocks or after them, where the embedding is read again if the head is tied to it."""
    units = (unit.name for unit in plan.units if unit.block is None)
    return max((plan.decoding_bytes.get(name, 0) for name in units), default=0)


def _source_bytes(plan: Plan, stage: str, used: Sequence[str]) -> int:
    specs = _specs(plan)
    units = [unit for unit in plan.units if unit.stage == stage]
    read = {name for unit in units for name in unit.sources}
    made = sum(spec_bytes(spec) for unit in units for spec in unit.tensors if spec.name not in unit.copied)
    return sum(spec_bytes(specs[name]) for name in read.union(used)) + made


def _recast_bytes(plan: Plan, linears: Iterable[LinearPlan], copied: Iterable[TensorSpec]) -> int:
    specs = [
        *((linear.weight_dtype, linear.rows * linear.columns) for linear in linears),
        *((spec.dtype, math.prod(spec.shape)) for spec in copied),
    ]
    live = _SAFETENSORS[plan.compute_dtype]
    return sum(DTYPE_BYTES[dtype] * size for dtype, size in specs if dtype != live)


def _late_bytes(linear: LinearPlan, wide: int) -> int:
    run = min(linear.rows, WEIGHT_ROWS) * linear.columns
    # Its levels, and where they are not run in fp32 what becomes of them.
    return run * (4 + wide * (wide != 4))


def _group_needs(
    linears: Sequence[LinearPlan],
    plan: Plan,
    tiles: Sequence[int],
    stored: int,
    *,
    is_centered: bool,
    pool: int | None,
    likeness: Likeness | None,
) -> GroupNeeds:
    """Of linears that are solved in tiles of so many rows."""
    columns, rows = linears[0].columns, sum(linear.rows for linear in linears)
    codes = rows * columns * (len(tiles) > 1)
    device_type = device_type_of(plan.device_kind)
    highest = min(max(tiles), tile_height(columns, device_type))
    solve = (1 + _TILE_BUFFERS) * 4 * highest * columns + 2 * rows * columns
    if is_centered:
        # The weights once more in fp32, from which a bias is found.
        solve += 4 * rows * columns
    if plan.calibration_digest is None:
        return GroupNeeds(
            pool=None,
            total=0,
            partial=0,
            source=rows * columns * stored,
            solve=solve,
            codes=codes,
            likeness=likeness,
        )
    size = columns + is_centered
    square = size**2
    lower = sum(math.prod(shape) for shape in panel_shapes(size, is_whole=False))
    strips = sum(math.prod(shape) for shape in strip_shapes(size, device_type))
    crosses: bool = plan.options["correct_targets"] and linears[0].experts is None
    return GroupNeeds(
        pool=pool,
        # int64, and fp32: of X^T X a little more than the lower triangle, of X_ref^T X all.
        total=8 * (lower + square * crosses),
        partial=4 * (strips + square * crosses),
        source=rows * columns * stored,
        # Corrected targets need a factor of their own, and the product that they are corrected by.
        solve=solve + int((1 + _FACTOR_SIZES) * 4 * square) + 8 * square * crosses,
        codes=codes,
        likeness=likeness,
    )
