"""One random block through the product's steps on one device, stage by stage, as a worker takes them.

What a worker has from storage is made here instead: weights on the host, token rows in a folder.
"""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from block_models import random_tensor, stored_shapes
from block_plan import DIGEST, BlockRequest, block_plan, token_rows
from block_stopwatch import Stopwatch

from quantlib.block_statistics import BlockStatistics
from quantlib.calibration.totals import Total
from quantlib.group_solver import GroupSolver
from quantlib.job.activations import CALIBRATION, cells_of
from quantlib.job.alike_groups import even_batches, likenesses
from quantlib.job.bands import sum_shapes
from quantlib.job.bundle import Bundle
from quantlib.job.expert_groups import TokenCounts, group_tokens, readers_of
from quantlib.job.manifest import tokens_uri
from quantlib.job.plan import Groups, Plan
from quantlib.methods import METHODS
from quantlib.methods.whole_solve import Method
from quantlib.model.skeleton import Skeleton, load_skeleton
from quantlib.packing import FORMATS
from quantlib.solver_settings import SolverSettings
from quantlib.steps import dequantized_weights, input_schemes
from quantlib.storage import normalize_uri, open_store
from quantlib.stream_shelf import Shelf
from quantlib.tokens import store_rows
from quantlib.worker_cells import WorkerCells

Tensors = Mapping[str, torch.Tensor]
# Totals of X^T X, of products with a reference stream, of a pool: what a solver takes for an input group.
Sums = Sequence[Sequence[Total]]


def run_request(
    request: BlockRequest, watch: Stopwatch, methods: Mapping[str, Method] = METHODS
) -> tuple[Plan, list[dict[str, Any]]]:
    """Measure the stages of a block: load, capture, sums to host, solve, pack, and perhaps propagate.

    Args:
        methods: Name -> method, on the device.

    Returns:
        The plan, and rows of the report about its linears.
    """
    skeleton = load_skeleton(request.model.config, list(stored_shapes(request.model.config)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        home = normalize_uri(folder)
        plan = block_plan(request, skeleton, home)
        store_rows(open_store(home), tokens_uri(home, DIGEST), token_rows(request))
        packer, settings = FORMATS[plan.options["format"]], SolverSettings.from_options(plan.options)
        solver = GroupSolver(packer, settings, torch.device(request.device), request.height, methods)
        return plan, _Block(request, plan, skeleton, solver, watch).run()


def sums_of(plan: Plan, groups: Groups, totals: Sequence[Total]) -> dict[int, Sums]:
    """Input group -> its own sum and, where that is shrunk towards one, the sum of all experts' tokens.

    Args:
        totals: As `quantlib.job.bands.sum_shapes` of block 0 names them.
    """
    shapes, pools = sum_shapes(plan, 0, groups), readers_of(plan, plan.blocks[0]).pools
    by_reader = {shape.reader: total for shape, total in zip(shapes, totals, strict=True)}
    return {
        group: ([by_reader[group]], [], [by_reader[pools[group]]] if group in pools else [])
        for group in groups
    }


class _Block:
    """The block on its way through the stages."""

    def __init__(
        self, request: BlockRequest, plan: Plan, skeleton: Skeleton, solver: GroupSolver, watch: Stopwatch
    ) -> None:
        self._plan, self._skeleton, self._solver, self._watch = plan, skeleton, solver, watch
        self._planned = plan.blocks[0]
        self._device = torch.device(request.device)
        self._live_kind = {"dtype": getattr(torch, plan.compute_dtype), "device": self._device}
        self._shapes = stored_shapes(request.model.config)
        self._packer = FORMATS[plan.options["format"]]
        numbers = tuple(range(len(self._planned.input_groups)))
        bundle = Bundle(shared=plan, outputs=(plan,), sums=((numbers,),), solvers=(0,))
        self._cells = WorkerCells(bundle, open_store(plan.work), self._device, Shelf(None))
        self._statistics = BlockStatistics(plan, self._cells, self._device)
        self._passes = even_batches(numbers, -(-len(numbers) // request.passes))
        self._keys = cells_of(plan)[CALIBRATION]

    def run(self) -> list[dict[str, Any]]:
        """All stages; gives the report rows of the linears."""
        prelude = {name: self._made_one(name) for name in self._plan.prelude_tensors}
        outer = self._skeleton.build_outer(prelude, **self._live_kind)
        self._cells.embed(outer, None, self._keys)
        del prelude, outer
        # As they would come from storage.
        tensors = {name: self._made_one(name).cpu() for name in self._planned.tensors}
        packed: dict[str, torch.Tensor] = {}
        rows: list[dict[str, Any]] = []
        for groups in self._passes:
            totals, counts = self._observed(tensors, groups)
            self._solve(groups, tensors, totals, counts, packed, rows)
        if self._plan.options["propagation"] == "quantized":
            self._propagate(tensors, packed)
        return rows

    def _made_one(self, name: str) -> torch.Tensor:
        return random_tensor(name, self._shapes[name], self._device)

    def _observed(self, tensors: Tensors, groups: Groups) -> tuple[list[Total], TokenCounts]:
        """The exact sums of some input groups, on the host, and the tokens behind them."""
        with self._watch.stage("load"):
            module = self._skeleton.build_block(0, tensors, **self._live_kind)
        told: list[Mapping[str, Any]] = []
        with self._watch.stage("capture"):
            for key in self._keys:
                exponents = told[0]["exponents"] if told else None
                is_last = groups == self._passes[-1]
                told.append(self._statistics.observe(module, 0, key, groups, [], exponents, moves=is_last))
        del module
        with self._watch.stage("sums to host"):
            found, _ = self._statistics.totals(0, groups, told[0]["exponents"])
            totals = [Total.of([total.band(0, len(total.panels))]) for total in found]
        return totals, TokenCounts.over(told)

    def _solve(
        self,
        groups: Groups,
        tensors: Tensors,
        totals: Sequence[Total],
        counts: TokenCounts,
        packed: dict[str, torch.Tensor],
        rows: list[dict[str, Any]],
    ) -> None:
        tokens, sums = group_tokens(self._plan, self._planned, counts), sums_of(self._plan, groups, totals)
        every_tile = self._solver.tiles(self._planned)
        tiles = {group: every_tile[group] for group in groups}
        for batch in self._batches(tiles):
            (first, *_), behind = batch, [tokens[group] for group in batch]
            if len(tiles[first]) == 1:
                with self._watch.stage("solve"):
                    given = [sums[group] for group in batch]
                    made = self._solver.solve_batch(self._planned, batch, tensors, given, behind)
            else:
                with self._watch.stage("solve"):
                    solved = [
                        self._solver.solve_tile(self._planned, tile, tensors, sums[first], *behind)
                        for tile in tiles[first]
                    ]
                    self._solver.forget()
                with self._watch.stage("pack"):
                    made = [self._solver.pack(self._planned, first, solved, *behind)]
            for its_packed, its_rows in made:
                packed |= its_packed
                rows += its_rows

    def _batches(self, tiles: Mapping[int, Sequence[Any]]) -> list[Groups]:
        """Input groups that are solved together, those that are alone first."""
        alike = likenesses(self._planned, tiles, self._device.type)
        batches: list[Groups] = [(group,) for group in tiles if group not in alike]
        for likeness in dict.fromkeys(alike.values()):
            same = [group for group, found in alike.items() if found == likeness]
            batches += even_batches(same, likeness.most)
        return batches

    def _propagate(self, tensors: Tensors, packed: Tensors) -> None:
        with self._watch.stage("propagate"):
            levels = dequantized_weights(self._planned, packed, self._packer, self._device)
            inputs = input_schemes(self._planned)
            module = self._skeleton.build_block(0, {**tensors, **levels}, inputs=inputs, **self._live_kind)
            for key in self._keys:
                stream = self._cells[key].main
                assert stream is not None
                self._cells.move(stream, self._cells[key], module, 0)
