"""The Hessians of all input groups of a model, gathered once and kept: a file a block.

B sequences, T positions, D hidden, C columns (in features).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantlib.batches import Batch, BatchInputs
from quantlib.calibration.totals import Total, exponent_for, matrix_from
from quantlib.cells import Cell, cut_into_cells
from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.errors import NumericsError
from quantlib.model.skeleton import BlockSpec, Skeleton
from quantlib.readers import Reader
from quantlib.steps import observe_cell
from quantlib.storage import Store
from quantlib.stream_shelf import Shelf

_CELL_TOKENS, _BATCH_TOKENS = 4096, 1024


def block_file(folder: Path, index: int) -> Path:
    """Where the Hessians of a block are."""
    return folder / f"block-{index:03d}.safetensors"


def gather_hessians(
    store: Store, checkpoint: Checkpoint, skeleton: Skeleton, rows_BT: torch.Tensor, folder: Path
) -> None:
    """Write the Hessians of all input groups, a file a block: first linear of a group -> fp32 [C, C].

    The original activations are propagated in fp32, by the steps of a job.
    """
    prelude = read_tensors(store, checkpoint, skeleton.prelude_tensors)
    outer = skeleton.build_outer(prelude, dtype=torch.float32, device="cpu")
    cells = cut_into_cells(rows_BT, max(1, _CELL_TOKENS // rows_BT.shape[1]), Shelf())
    inputs = BatchInputs(max(1, _BATCH_TOKENS // rows_BT.shape[1]))
    for cell in cells:
        cell.start(inputs.embed(outer, cell.ids_BT))
    for index in range(skeleton.num_blocks):
        spec = skeleton.block_spec(index)
        tensors = read_tensors(store, checkpoint, spec.tensors)
        block = skeleton.build_block(index, tensors, dtype=torch.float32, device="cpu")
        partial = folder / "partial"
        batches = [inputs.of(cell.ids_BT, index) for cell in cells]
        save_file(_observed(block, spec, cells, batches), partial)
        partial.rename(block_file(folder, index))


def _observed(
    block: torch.nn.Module, spec: BlockSpec, cells: Sequence[Cell], batches: Sequence[Sequence[Batch]]
) -> dict[str, torch.Tensor]:
    """The Hessians of a block; every cell's stream moves through it."""
    paths = {linear.name: linear.path for linear in spec.linears}
    leaders = [group[0] for group in spec.input_groups]
    readers = {n: Reader(name=leader, path=paths[leader]) for n, leader in enumerate(leaders)}
    totals = []
    for cell, own in zip(cells, batches, strict=True):
        assert cell.main is not None
        observed = observe_cell(block, readers, cell.main.hidden_BTD, own, (), readers)
        if observed.left_out:
            raise NumericsError(
                f"{spec.prefix}: rows {sorted(observed.left_out)} of calibration cell {cell.number} have"
                " activations that are not finite; compare variants on other text or another model"
            )
        grams = [observed.statistics.grams[group] for group in readers]
        if not totals:
            exponents = [exponent_for(gram.peak, len(cells)) for gram in grams]
            totals = [
                Total.zeros(len(gram.diagonal), exponent)
                for gram, exponent in zip(grams, exponents, strict=True)
            ]
        for total, gram in zip(totals, grams, strict=True):
            total.add_(gram.panels)
        cell.main.place(observed.output_BTD, spec.index + 1)
    sums = zip(spec.input_groups, totals, strict=True)
    return {group[0]: matrix_from([total]) for group, total in sums}
