"""A job in virtual time: the product's schedule and its loop over blocks, on costs instead of tensors.

`quantlib.job.schedule` decides who does what next, as in the product. The loop is that of
`quantlib.job.conversion`, the pieces and what a worker waits for are those of `quantlib.job.crew`: whoever
changes one of them changes this file. Nobody is lost here, and no storage fails.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

from quantlib.job.bands import MAX_DIRECT_BATCHES
from quantlib.job.cadence import Cadence
from quantlib.job.cell_streams import after_first_cell
from quantlib.job.plan import Groups
from quantlib.job.schedule import Piece, PieceId, Schedule
from quantlib.job.solve_pieces import GroupWork, solve_pieces
from quantlib.simulation.clock import Clock, Future, Process
from quantlib.simulation.costs import CODE_BYTES, WIDE_BYTES, Costs, Workload
from quantlib.simulation.exchange import Exchange
from quantlib.simulation.hardware import Cluster
from quantlib.simulation.shapes import BlockShape, ModelShape
from quantlib.simulation.timeline import Timeline, Turn

# Stages whose pieces are calibration cells; those of the others, but solve, are evaluation cells.
_CALIBRATING = ("capture", "move")
_ORIGINAL, _QUANTIZED = "original", "quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulated job took.

    Attributes:
        wall_s: From the first byte to the last.
        timeline: Who did what when.
        read_bytes: From storage.
        written_bytes: To storage.
        network_bytes: Between nodes.
        moved_cells: How often a worker that had nothing to do took over a cell of a busy one.
    """

    wall_s: float
    timeline: Timeline
    read_bytes: float
    written_bytes: float
    network_bytes: float
    moved_cells: int


def simulate(shape: ModelShape, workload: Workload, cluster: Cluster) -> Outcome:
    """Run a job through; every GPU of the cluster is a worker."""
    run = _Run(Costs(shape=shape, workload=workload, rates=cluster.rates), cluster)
    has_streams = workload.sequences or workload.evaluation_sequences
    run.clock.start(run.with_streams() if has_streams else run.without_streams())
    run.clock.run()
    return Outcome(
        wall_s=run.clock.now,
        timeline=run.timeline,
        read_bytes=run.exchange.read_bytes,
        written_bytes=run.exchange.written_bytes,
        network_bytes=run.exchange.network_bytes,
        moved_cells=run.moved_cells,
    )


@dataclass(frozen=True, slots=True)
class _Cell:
    """Tokens of a cell, and of which corpus it is."""

    tokens: int
    is_evaluation: bool


class _Run:
    """What a running job keeps."""

    def __init__(self, costs: Costs, cluster: Cluster) -> None:
        self.clock, self.timeline = Clock(), Timeline(cluster.num_workers)
        self.exchange = Exchange(cluster)
        self.moved_cells = 0
        self._costs, self._cluster = costs, cluster
        # Asked for by every piece of a block.
        self._capture_s = cache(lambda block, tokens: costs.capture_s(self._blocks[block], tokens))
        self._num_sums = cache(self._counted_sums)
        self._work, self._blocks = costs.workload, costs.shape.blocks
        self._workers = range(cluster.num_workers)
        self._schedule = Schedule()
        for worker in self._workers:
            self._schedule.join(worker, memory_bytes=0)
        self._lanes = [0.0] * cluster.num_workers
        self._stages: dict[PieceId, _Stage] = {}
        self._is_assigning = False
        self._read_at: dict[int, float] = {}
        self._pulled_at: dict[tuple[int, int, str], float] = {}
        self._live: dict[tuple[int, str], int] = {}
        self._observers: dict[int, set[int]] = {}
        self._solved_on: dict[int, Counter[int]] = {}
        # Worker -> the group of a block whose factor it has; codes of row tiles by the node that has them.
        self._prepared: dict[int, tuple[int, int]] = {}
        self._codes: dict[tuple[int, int], Counter[int]] = {}
        # Block and number of a piece -> the input groups that are solved whole in it.
        self._solved_together: dict[tuple[int, int], Groups] = {}
        self._calibration = [_Cell(tokens, False) for tokens in self._work.cells(self._work.sequences)]
        self._evaluation = [
            _Cell(tokens, True) for tokens in self._work.cells(self._work.evaluation_sequences)
        ]
        self._homes: dict[_Key, int] = {}
        self._writing: Future | None = None
        self._ahead: Future | None = None

    def with_streams(self) -> Process:
        """Blocks in order, activations flowing."""
        yield self.clock.start(self._embed())
        held = [self._held_bytes(worker) for worker in self._workers]
        cadence = Cadence(self._work.checkpoint_every, max(held), clock=lambda: self.clock.now)
        indices = range(len(self._blocks))
        for block, following in zip_longest(indices, indices[1:]):
            self._prefetch(block)
            keeps = following is not None and cadence.is_due(following)
            if following is not None:
                self._prefetch(following)
            yield self.clock.start(self._convert_block(block, None if keeps else following))
            if keeps:
                began = self.clock.now
                yield self.clock.start(self._keep_activations(held))
                cadence.kept(self.clock.now - began)
        if self._writing is not None:
            yield self._writing
        yield self.clock.start(self._head())

    def without_streams(self) -> Process:
        """Every unit on its own: the blocks, and what stands before and after them."""
        yield self._begin([Piece(id=PieceId(n, "unit", 0), rank=n) for n in range(len(self._blocks) + 2)])

    def _convert_block(self, block: int, following: int | None) -> Process:
        moving, self._ahead = self._ahead or self.clock.start(self._capture(block)), None
        yield moving
        if self._writing is not None:
            yield self._writing
        solving = self._begin(self._solves(block))
        overlaps = len(self._workers) > 1 and self._work.propagation == "original"
        if following is not None and overlaps:
            self._ahead = self.clock.start(self._capture(following, is_ahead=True))
        yield solving
        self._writing = self.clock.start(self._write(block))
        if self._work.evaluation_sequences or self._is_quantized:
            moves = self._pieces(block, "move", self._calibration if self._is_quantized else ())
            yield self._begin([*moves, *self._pieces(block, "evaluate", self._evaluation)])

    @property
    def _is_quantized(self) -> bool:
        return self._work.propagation == "quantized"

    def _embed(self) -> Process:
        """What stands before the blocks: read by all, on every worker, and written by one."""
        size = self._costs.shape.prelude_bytes
        there = self.exchange.read(self.clock.now, size)
        for worker in self._workers:
            turn = self._turn(worker)
            turn.wait(there, "read")
            self._pull(turn, worker, -1, _ORIGINAL, size)
            turn.spend(self._costs.copy_s(size), "copy")
            self._lanes[worker] = turn.at
        self._deal()
        yield self.clock.until(max(self._lanes))
        yield self.clock.until(self._stored(self.clock.now, 0, size))

    def _capture(self, block: int, *, is_ahead: bool = False) -> Process:
        """Calibration cells with statistics, evaluation cells beside them; then the sums are added up."""
        forwards = self._pieces(block, "forward", self._evaluation)
        if is_ahead:
            forwards = [
                Piece(
                    id=piece.id,
                    rank=piece.rank,
                    home=piece.home,
                    after=frozenset({PieceId(block - 1, "evaluate", piece.id.part)}),
                )
                for piece in forwards
            ]
        captures = after_first_cell(self._pieces(block, "capture", self._calibration))
        yield self._begin([*captures, *forwards])
        sums = sum(self._costs.sum_bytes(group) for group in self._blocks[block].groups)
        ends = [self.clock.now]
        for worker in self._observers.get(block, ()):
            turn = self._turn(worker)
            turn.spend(self._costs.copy_s(sums), "copy")
            self._lanes[worker] = turn.at
            ends.append(turn.at)
        yield self.clock.until(max(ends))
        yield self.clock.until(self._add_up(block, sums))

    def _add_up(self, block: int, size_bytes: float) -> float:
        """Sums of the observers on their nodes, then between nodes; gives when it is done."""
        nodes = self._observing_nodes(block)
        if len(self._observers.get(block, ())) <= MAX_DIRECT_BATCHES or len(nodes) == 1:
            return self.clock.now
        # Each worker takes its part of the bands to its GPU, where NCCL adds them, and its own of them back.
        per_node = self._cluster.gpus_per_node
        copy_s = self._costs.copy_s(size_bytes * (1 + 1 / len(nodes)) / per_node)
        there = self.exchange.reduce(self.clock.now, nodes, size_bytes)
        for worker in self._workers:
            if self._cluster.node_of(worker) in nodes:
                turn = self._turn(worker)
                turn.spend(copy_s, "copy")
                turn.wait(there, "network")
                self._lanes[worker] = turn.at
        return max(self._lanes[worker] for worker in self._workers)

    def _observing_nodes(self, block: int) -> list[int]:
        return sorted({self._cluster.node_of(worker) for worker in self._observers.get(block, ())})

    def _solves(self, block: int) -> list[Piece]:
        works, first = [], 0
        for number, group in enumerate(self._blocks[block].groups):
            tiles = range(first, first + len(group.tiles))
            work = GroupWork(
                group=number,
                tiles=tuple(tiles),
                is_cut=len(tiles) > 1,
                prepare_cost=self._costs.prepare_s(group),
                tile_cost=self._costs.tiles_s(group) / len(tiles),
                likeness=group.likeness,
            )
            works.append(work)
            first = tiles.stop
        found = solve_pieces(block, works, self._workers)
        self._solved_together |= {(block, name.part): groups for name, groups in found.groups.items()}
        return list(found.pieces)

    def _write(self, block: int) -> Process:
        """The packed tensors on one worker, and from there to storage."""
        worker, size = block % len(self._workers), self._blocks[block].output_bytes
        node = self._cluster.node_of(worker)
        there = self.exchange.gather(self.clock.now, node, self._packed_bytes(block))
        # Its place in the worker's storage lane is taken now: what is prefetched next comes after it.
        yield self.clock.until(self._stored(there, worker, size))

    def _keep_activations(self, held: Sequence[int]) -> Process:
        """Every worker's streams to storage, once the last shard is there."""
        if self._writing is not None:
            yield self._writing
        for worker in self._workers:
            turn = self._turn(worker)
            turn.spend(self._costs.copy_s(held[worker]), "copy")
            turn.wait(self.exchange.write(turn.at, worker, held[worker]), "write")
            self._lanes[worker] = turn.at
        yield self.clock.until(max(self._lanes))

    def _head(self) -> Process:
        """What stands after the blocks: read, used where there is evaluation, written by one."""
        last = len(self._blocks)
        self._read_at[last] = self.exchange.read(self.clock.now, self._costs.shape.tail_bytes)
        yield self._begin(self._pieces(last, "score", self._evaluation))
        there = max(self._read_at[last], self.clock.now)
        yield self.clock.until(self._stored(there, 0, self._costs.shape.tail_bytes))

    def _stored(self, since: float, worker: int, size_bytes: float) -> float:
        """When one worker has stored what it has from some time on."""
        end = self.exchange.write(since, worker, size_bytes)
        self.timeline.add_write(self.clock.now, end)
        return end

    def _pieces(self, block: int, stage: str, cells: Sequence[_Cell]) -> list[Piece]:
        return [
            Piece(
                id=PieceId(block, stage, number),
                rank=block,
                home=self._homes[stage not in _CALIBRATING, number],
            )
            for number in range(len(cells))
        ]

    def _begin(self, pieces: Sequence[Piece]) -> Future:
        """Have pieces done; what is given is done when all are."""
        stage = _Stage(left=len(pieces), ended=Future())
        if not pieces:
            stage.ended.finish()
            return stage.ended
        self._schedule.add(pieces)
        self._stages |= dict.fromkeys((piece.id for piece in pieces), stage)
        self._assign_soon()
        return stage.ended

    def _assign_soon(self) -> None:
        """Once everything that happens at this time has happened."""
        if not self._is_assigning:
            self._is_assigning = True
            self.clock.at(self.clock.now, self._assign)

    def _assign(self) -> None:
        self._is_assigning = False
        for assignment in self._schedule.assign():
            worker, turn = assignment.worker, self._turn(assignment.worker)
            self._do(turn, worker, assignment.piece.id)
            self._lanes[worker] = turn.at
            self.clock.at(turn.at, lambda worker=worker: self._end(worker))

    def _end(self, worker: int) -> None:
        piece = self._schedule.finish(worker)
        stage = self._stages.pop(piece.id)
        stage.left -= 1
        if not stage.left:
            stage.ended.finish()
        self._assign_soon()

    def _do(self, turn: Turn, worker: int, name: PieceId) -> None:
        costs = self._costs
        match name.stage:
            case "solve":
                self._solve(turn, worker, name)
            case "pack":
                self._pack(turn, worker, name)
            case "unit":
                self._unit(turn, worker, name.block)
            case "score":
                cell = self._bring(turn, worker, name)
                self._make_live(turn, worker, name.block, _ORIGINAL, costs.shape.tail_bytes)
                turn.spend(costs.score_s(cell.tokens), "evaluate")
            case "capture":
                cell = self._bring(turn, worker, name)
                self._make_live(turn, worker, name.block, _ORIGINAL, self._blocks[name.block].source_bytes)
                self._observers.setdefault(name.block, set()).add(worker)
                turn.spend(self._capture_s(name.block, cell.tokens), "capture")
            case stage:
                cell = self._bring(turn, worker, name)
                block, kind = self._blocks[name.block], _ORIGINAL if stage == "forward" else _QUANTIZED
                self._make_live(turn, worker, name.block, kind, block.source_bytes)
                turn.spend(costs.forward_s(block, cell.tokens), "evaluate")

    def _solve(self, turn: Turn, worker: int, name: PieceId) -> None:
        """Whole input groups, or a row tile of one that the worker factors unless it has."""
        block, costs = self._blocks[name.block], self._costs
        self._pull(turn, worker, name.block, _ORIGINAL, block.source_bytes)
        if (name.block, name.part) in self._solved_together:
            self._solve_groups(turn, worker, name.block, self._solved_together.pop((name.block, name.part)))
            return
        number, rows = _tiles(block)[name.part]
        self._take_sums(turn, worker, name.block, [number])
        if self._prepared.get(worker) != (name.block, number):
            self._prepare(turn, name.block, number)
        weights = rows * block.groups[number].columns
        turn.spend(costs.copy_s(weights * WIDE_BYTES), "copy")
        turn.spend(costs.tile_s(block.groups[number], rows), "solve")
        self._prepared[worker] = (name.block, number)
        turn.spend(costs.copy_s(weights * CODE_BYTES), "copy")
        codes = self._codes.setdefault((name.block, number), Counter())
        codes[self._cluster.node_of(worker)] += weights * CODE_BYTES

    def _solve_groups(self, turn: Turn, worker: int, block: int, numbers: Groups) -> None:
        """A batch of whole input groups, which takes the loop over columns that a tile of all rows takes."""
        self._prepared.pop(worker, None)
        self._take_sums(turn, worker, block, numbers)
        for number in numbers:
            self._prepare(turn, block, number)
        groups = [self._blocks[block].groups[number] for number in numbers]
        weights = sum(group.weights for group in groups)
        turn.spend(self._costs.copy_s(weights * WIDE_BYTES), "copy")
        turn.spend(self._costs.tile_s(groups[0], sum(group.rows for group in groups)), "solve")
        self._solved_on.setdefault(block, Counter())[self._cluster.node_of(worker)] += weights

    def _take_sums(self, turn: Turn, worker: int, block: int, numbers: Sequence[int]) -> None:
        """The parts of sums come to the worker, which begins with nothing before all are there."""
        for number in numbers:
            size = self._costs.sum_bytes(self._blocks[block].groups[number])
            sent = {sender: count * size for sender, count in self._num_sums(block).items()}
            self._gather(turn, self._cluster.node_of(worker), (block, f"sum {number}"), sent)

    def _prepare(self, turn: Turn, block: int, number: int) -> None:
        """A group's sums on the GPU, and their factor."""
        group = self._blocks[block].groups[number]
        copied = sum(self._num_sums(block).values()) * self._costs.sum_bytes(group)
        turn.spend(self._costs.copy_s(copied), "copy")
        turn.spend(self._costs.prepare_s(group), "solve")

    def _pack(self, turn: Turn, worker: int, name: PieceId) -> None:
        """The codes of all tiles come to the worker."""
        node, codes = self._cluster.node_of(worker), self._codes.pop((name.block, name.part))
        turn.wait(self.exchange.gather(turn.at, node, codes), "network")
        turn.spend(self._costs.copy_s(codes.total()), "copy")
        weights = self._blocks[name.block].groups[name.part].weights
        self._solved_on.setdefault(name.block, Counter())[node] += weights

    def _counted_sums(self, block: int) -> Mapping[int, float]:
        """Node -> sums that are there: equal parts of one, or what few observers have."""
        observers, nodes = self._observers.get(block, ()), self._observing_nodes(block)
        if len(observers) <= MAX_DIRECT_BATCHES:
            return Counter(self._cluster.node_of(worker) for worker in observers)
        return dict.fromkeys(nodes, 1 / len(nodes))

    def _unit(self, turn: Turn, worker: int, number: int) -> None:
        """A block, or what stands before or after the blocks, read, rounded and written by one worker."""
        shape = self._costs.shape
        sizes = [(block.source_bytes, block.output_bytes) for block in self._blocks]
        sizes += [(shape.prelude_bytes, shape.prelude_bytes), (shape.tail_bytes, shape.tail_bytes)]
        source_bytes, output_bytes = sizes[number]
        turn.wait(self.exchange.read_part(turn.at, worker, source_bytes), "read")
        turn.wait(self.exchange.write(turn.at, worker, output_bytes), "write")

    def _turn(self, worker: int) -> Turn:
        """From when the worker has nothing else to do."""
        return Turn(self.timeline, max(self.clock.now, self._lanes[worker]))

    def _prefetch(self, block: int) -> None:
        if block not in self._read_at:
            self._read_at[block] = self.exchange.read(self.clock.now, self._blocks[block].source_bytes)

    def _make_live(self, turn: Turn, worker: int, block: int, kind: str, size: int) -> None:
        """Weights on the worker's GPU, in place of those of the block before."""
        if self._live.get((worker, kind)) != block:
            self._pull(turn, worker, block, kind, size)
            turn.spend(self._costs.copy_s(size), "copy")
            self._live[worker, kind] = block

    def _pull(self, turn: Turn, worker: int, block: int, kind: str, size: int) -> None:
        """Parts of weights that other nodes read or packed, once a node."""
        turn.wait(self._read_at.get(block, 0.0), "read")
        parts = self._packed_bytes(block) if kind == _QUANTIZED else self._even_parts(size)
        self._gather(turn, self._cluster.node_of(worker), (block, kind), parts)

    def _gather(self, turn: Turn, node: int, what: tuple[int, str], parts: Mapping[int, float]) -> None:
        """What other nodes have comes to a node once, and is then there for all its workers."""
        if (node, *what) not in self._pulled_at:
            self._pulled_at[node, *what] = self.exchange.gather(turn.at, node, parts)
        turn.wait(self._pulled_at[node, *what], "network")

    def _even_parts(self, size_bytes: float) -> dict[int, float]:
        nodes = self._cluster.num_nodes
        return dict.fromkeys(range(nodes), size_bytes / nodes)

    def _packed_bytes(self, block: int) -> dict[int, float]:
        """Node -> bytes of the block's shard that were made there."""
        solved = self._solved_on.get(block, Counter())
        share = self._blocks[block].output_bytes / max(1, solved.total())
        return {node: weights * share for node, weights in solved.items()}

    def _deal(self) -> None:
        """A cell to whoever has fewest of its kind, and then fewest at all."""
        total: Counter[int] = Counter()
        for is_evaluation, cells in ((False, self._calibration), (True, self._evaluation)):
            alike: Counter[int] = Counter()
            for number in range(len(cells)):
                home = min(self._workers, key=lambda worker: (alike[worker], total[worker]))
                alike[home] += 1
                total[home] += 1
                self._homes[is_evaluation, number] = home

    def _cells(self) -> Iterator[tuple["_Key", _Cell]]:
        for is_evaluation, cells in ((False, self._calibration), (True, self._evaluation)):
            yield from (((is_evaluation, number), cell) for number, cell in enumerate(cells))

    def _held_bytes(self, worker: int) -> int:
        return sum(
            self._costs.cell_bytes(cell.tokens, is_evaluation=cell.is_evaluation)
            for key, cell in self._cells()
            if self._homes[key] == worker
        )

    def _bring(self, turn: Turn, worker: int, name: PieceId) -> _Cell:
        """The cell of a piece; one that another worker has comes here."""
        is_evaluation = name.stage not in _CALIBRATING
        cell = (self._evaluation if is_evaluation else self._calibration)[name.part]
        home = self._homes[is_evaluation, name.part]
        if home != worker:
            size = self._costs.cell_bytes(cell.tokens, is_evaluation=is_evaluation)
            sender, node = self._cluster.node_of(home), self._cluster.node_of(worker)
            turn.spend(self._costs.copy_s(size), "copy")
            turn.wait(self.exchange.gather(turn.at, node, {sender: size}), "network")
            turn.spend(self._costs.copy_s(size), "copy")
            self._homes[is_evaluation, name.part] = worker
            self.moved_cells += 1
        return cell


def _tiles(block: BlockShape) -> list[tuple[int, int]]:
    """Group and rows of every row tile."""
    return [(number, rows) for number, group in enumerate(block.groups) for rows in group.tiles]


# Whether a cell is of the evaluation text, and its number.
_Key = tuple[bool, int]


@dataclass(slots=True)
class _Stage:
    """Pieces that were begun together."""

    left: int
    ended: Future
