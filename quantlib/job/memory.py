"""How a job fits into memory: what is done at a time and what one after the other.

Nothing here changes a byte of the output. A *slice* is the input groups of a block that are summed and solved
together: less memory means more slices, and every slice is another pass of the cells through the block.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from quantlib.errors import RecipeError
from quantlib.job.bands import MAX_DIRECT_BATCHES
from quantlib.job.bundle import Bundle
from quantlib.job.memory_needs import (
    BlockNeeds,
    EndNeeds,
    GroupNeeds,
    UnitNeeds,
    bundled_needs,
    cell_needs,
    head_needs,
    prelude_needs,
    records_needs,
    solve_bytes,
    unit_needs,
    writing_needs,
)
from quantlib.job.options import JobOptions
from quantlib.job.plan import Groups
from quantlib.memory_watch import KEPT_BYTES, PINNED_SLOTS_BYTES
from quantlib.units import format_bytes, parse_bytes

# What is on the GPU where there is one; everything else is in the memory of its machine.
_ON_DEVICE = ("block", "next block", "working", "statistics", "solve", "activations", "ends")
# What goes from worker to worker: in an object store where there is one.
_EXCHANGED = ("source", "packed", "codes", "sums", "merged sums")
# Streams between the GPU and its machine's memory.
_PASSING = "passing activations"

Slices = tuple[tuple[Groups, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that may be used; None where nothing is said.

    Attributes:
        worker: Memory of a worker's process, its libraries included.
        device: Memory of a worker's GPU.
        store: Ray's shared memory on a node.
    """

    worker: int | None = None
    device: int | None = None
    store: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that machines have for workers.

    Attributes:
        worker_bytes: For each worker; None when it is not known.
        device_bytes: Of its GPU; None without one.
        store_bytes: Of a node's object store; None without one.
        store_workers: How many workers share it; 0 where tensors are passed on within a process.
    """

    worker_bytes: int | None = None
    device_bytes: int | None = None
    store_bytes: int | None = None
    store_workers: int = 0


def budgets_from(options: JobOptions, room: Room) -> Budgets:
    """What a request allows; what it does not name is bounded by the machines."""

    def named(option: str) -> int | None:
        text: str | None = getattr(options, option)
        return None if text is None else parse_bytes(text, option)

    return Budgets(
        worker=named("worker_memory") or room.worker_bytes,
        device=named("device_memory") or room.device_bytes,
        store=named("object_store_memory") or room.store_bytes,
    )


def heap_bytes(bundle: Bundle, options: JobOptions) -> int:
    """Freed memory that a worker keeps: one without streams frees little, a named budget forbids it."""
    return KEPT_BYTES if bundle.has_streams and options.worker_memory is None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where the work is done.

    Attributes:
        workers: How many there are.
        idle_bytes: Memory of a worker's process before any work.
        has_device: Whether a worker computes on a GPU with memory of its own.
        store_workers: How many share an object store; 0 where tensors are passed on within a process.
        kept_bytes: Freed memory that a worker's process does not give back.
    """

    workers: int
    idle_bytes: int
    kept_bytes: int = 0
    has_device: bool = False
    store_workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is done at a time, and what it takes.

    Attributes:
        slices: Of every block, in order; the streams go on with the last.
        pipelines: Whether the next block is fetched and begun while one is still worked on and written.
        brings_ahead: Whether the weights of the next block come to the GPU while one is still worked on.
        has_late_weights: Whether the linears of a live block make their weights only when they run.
        has_batches: Whether input groups that are alike are solved as one batch.
        activation_bytes: What the streams of a worker may take of its memory, or of its GPU; None for all.
        waiting_bytes: What is thus left of them to wait on disk, or beside a GPU in its machine's memory.
        worker: Purpose -> bytes of a worker's process when it needs most.
        device: The same of its GPU; empty without one.
        store: The same of a node's object store; empty without one.
        unsliced_bytes: What worker and GPU would need beyond idle memory with everything at a time.
    """

    slices: Slices
    pipelines: bool = True
    brings_ahead: bool = False
    has_late_weights: bool = False
    has_batches: bool = True
    activation_bytes: int | None = None
    waiting_bytes: int = 0
    worker: Mapping[str, int]
    device: Mapping[str, int]
    store: Mapping[str, int]
    unsliced_bytes: int


def plan_memory(bundle: Bundle, surroundings: Surroundings, budgets: Budgets) -> MemoryPlan:
    """The least frugal way in which a job fits.

    First no weights are brought to the GPU ahead, then streams leave memory, then one block is worked on at a
    time, then its linears make their weights as they run, then its input groups are cut into slices. Groups
    that are alike are solved as one batch where that changes nothing else.

    Raises:
        RecipeError: A budget is too small for one input group alone; says what would do.
    """
    needs = _Needs(bundle, surroundings)
    all_ahead = _Way(pipelines=True, brings_ahead=surroundings.has_device)
    at_once = needs.peak(needs.unsliced(), all_ahead, resident=needs.streams)
    unsliced_bytes = sum(at_once.worker.values()) + sum(at_once.device.values())
    unsliced_bytes -= surroundings.idle_bytes + surroundings.kept_bytes + needs.records
    for slices, way in _ways(needs, all_ahead, budgets):
        found, room, resident = needs.fitted(slices, budgets, way)
        plain = replace(way, has_batches=False, brings_ahead=False)
        if way != plain and resident < needs.fitted(slices, budgets, plain)[2]:
            continue
        if found.fits(budgets):
            return MemoryPlan(
                slices=slices,
                pipelines=way.pipelines,
                brings_ahead=way.brings_ahead,
                has_late_weights=way.is_late,
                has_batches=way.has_batches,
                activation_bytes=room,
                waiting_bytes=needs.streams - resident,
                worker=found.worker,
                device=found.device,
                store=found.store,
                unsliced_bytes=unsliced_bytes,
            )
    least, _, _ = needs.fitted(needs.single_groups(), budgets, needs.most_frugal)
    raise _refusal(least, budgets)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """How a job is done, beside its slices; attributes as in `MemoryPlan`."""

    pipelines: bool = False
    brings_ahead: bool = False
    is_late: bool = False
    has_batches: bool = True


def _ways(needs: "_Needs", all_ahead: _Way, budgets: Budgets) -> Iterator[tuple[Slices, _Way]]:
    """Slices, and how they are worked on; the next is asked for if one does not fit."""
    pipelined = dict.fromkeys((all_ahead, replace(all_ahead, brings_ahead=False)))
    for way in (*pipelined, _Way(), _Way(is_late=needs.late_helps)):
        yield needs.unsliced(), way
        yield needs.unsliced(), replace(way, has_batches=False)
    # Cut without batches: a pass over the cells costs more than they gain.
    slices = needs.cut(budgets)
    yield slices, replace(needs.most_frugal, has_batches=True)
    yield slices, needs.most_frugal


@dataclass(frozen=True, slots=True)
class _Peak:
    """Purpose -> bytes, of a moment or of the worst of several."""

    worker: Mapping[str, int]
    device: Mapping[str, int]
    store: Mapping[str, int]

    def fits(self, budgets: Budgets) -> bool:
        """Whether no budget is exceeded."""
        used = (self.worker, self.device, self.store)
        limits = (budgets.worker, budgets.device, budgets.store)
        return all(
            limit is None or sum(use.values()) <= limit for use, limit in zip(used, limits, strict=True)
        )

    def room(self, budgets: Budgets) -> int | None:
        """Bytes left where streams are; None where nothing bounds them."""
        use, limit = (self.device, budgets.device) if self.device else (self.worker, budgets.worker)
        return None if limit is None else limit - sum(use.values())

    def or_worse(self, other: "_Peak") -> "_Peak":
        """Of every place the fuller one."""
        pairs = ((self.worker, other.worker), (self.device, other.device), (self.store, other.store))
        return _Peak(*(max(pair, key=lambda use: sum(use.values())) for pair in pairs))


class _Needs:
    """What a job takes, as a function of how it is done."""

    def __init__(self, bundle: Bundle, surroundings: Surroundings) -> None:
        plan = bundle.shared
        self._surroundings = surroundings
        self._blocks = [bundled_needs(bundle, block) for block in range(len(plan.blocks))]
        cells = cell_needs(plan, surroundings.workers, num_outputs=len(bundle.outputs))
        self.streams, self._working = cells.streams, cells.working
        self._passing, self._pinned = cells.passing, cells.pinned
        is_original = plan.options["propagation"] == "original"
        self._num_merged = _num_merged(surroundings)
        self._begins_next = is_original and surroundings.workers > 1
        self._runs_quantized = plan.evaluation_digest is not None or not is_original
        # Of few linears that are alike, one as it runs may take more than all of them made beforehand.
        self.late_helps = all(
            block.late + block.unpacked * self._runs_quantized < block.live for block in self._blocks
        )
        self.most_frugal = _Way(is_late=self.late_helps, has_batches=False)
        self._has_streams = bundle.has_streams
        # Some outputs may round these and others not.
        self._prelude, self._head = (
            max(map(needs, bundle.outputs), key=lambda end: end.live) for needs in (prelude_needs, head_needs)
        )
        self._units = [] if bundle.has_streams else unit_needs(plan)
        self._writing = max(writing_needs(output) for output in bundle.outputs)
        self.records = len(bundle.outputs) * records_needs(plan)

    def unsliced(self) -> Slices:
        """Every block in one slice."""
        return tuple((tuple(range(len(block.groups))),) for block in self._blocks)

    def single_groups(self) -> Slices:
        """Every input group by itself."""
        return tuple(tuple((group,) for group in range(len(b.groups))) or ((),) for b in self._blocks)

    def fitted(self, slices: Slices, budgets: Budgets, way: _Way) -> tuple[_Peak, int | None, int]:
        """The peak with as much of the streams in place as has room; that room, and what they take."""
        least = self.peak(slices, way, resident=0)
        room = least.room(budgets)
        passing = least.device.get(_PASSING, 0)
        if room is not None and room + passing >= self.streams:
            room += passing  # where all are in place none has to pass
        resident = self.streams if room is None else max(0, min(room, self.streams))
        return self.peak(slices, way, resident=resident), room, resident

    def cut(self, budgets: Budgets) -> Slices:
        """Every block in as few slices as fit, in the order of its input groups."""
        return tuple(self._cut(number, budgets) for number in range(len(self._blocks)))

    def peak(self, slices: Slices, way: _Way, *, resident: int) -> _Peak:
        """The fullest that every place gets."""
        if not self._has_streams:
            return self._worst(self._conversions(), 0)
        moments = (
            moment
            for number, passes in enumerate(slices)
            for groups in passes
            for moment in self._moments(number, groups, way)
        )
        return self._worst(chain(self._ends(), moments), resident)

    def _cut(self, number: int, budgets: Budgets) -> tuple[Groups, ...]:
        passes: list[Groups] = []
        groups: Groups = ()
        for group in range(len(self._blocks[number].groups)):
            moments = self._moments(number, (*groups, group), self.most_frugal)
            if groups and not self._worst(moments, 0).fits(budgets):
                passes.append(groups)
                groups = ()
            groups = (*groups, group)
        return (*passes, groups)

    def _conversions(self) -> Iterator[dict[str, int]]:
        """What is there while a unit without data is converted and the one before is written."""
        for before, unit in pairwise([UnitNeeds(source=0, decoding=0, made=0, solve=0), *self._units]):
            made = before.made + unit.made
            pinned = {"pinned packed": made} if self._surroundings.has_device else {}
            always = {"parts": unit.source, "reading": unit.decoding, "made": made, **pinned}
            yield {**always, "solve": unit.solve}

    def _ends(self) -> Iterator[dict[str, int]]:
        """What is there before the blocks, while the first is fetched, and after them."""
        for end, block in ((self._prelude, self._blocks[0]), (self._head, None)):
            source = end.source + (0 if block is None else block.source)
            always = {"source": source, "writing": self._writing}
            yield {**always, "reading": self._reading(end)}
            yield {**always, "reading": self._reading(block), "ends": end.live, "working": end.working}

    def _reading(self, needs: BlockNeeds | EndNeeds | None) -> int:
        """Of tensors on their way from storage, in a worker's own memory.

        That is its part of those that go to an object store, and what decoding takes.
        """
        if needs is None:
            return 0
        shared = needs.source // self._surroundings.workers if self._surroundings.store_workers else 0
        return shared + needs.decoding

    def _moments(self, number: int, groups: Groups, way: _Way) -> Iterator[dict[str, int]]:
        """What is there at a time while a slice of a block is summed, solved, and evaluated."""
        block = self._blocks[number]
        following = self._blocks[number + 1] if number + 1 < len(self._blocks) else None
        always = {"source": block.source, "packed": block.packed, "writing": self._writing}
        ahead = {"block": 0, "statistics": 0, "working": 0}
        if self._surroundings.has_device:
            # Of powers of two, which PyTorch keeps.
            always["pinned packed"] = 2 * block.packed
        if way.brings_ahead and following is not None:
            always["next block"] = following.source
        if way.pipelines:
            neighbours = [*self._blocks[max(0, number - 1) : number], *([following] if following else [])]
            always["source"] += sum(neighbour.source for neighbour in neighbours)
            always["packed"] += block.packed
            always["reading"] = self._reading(following)
            if following is not None and self._begins_next:
                statistics = sum(_sums(following.groups))
                ahead = {"block": following.live, "statistics": statistics, "working": self._working}
        mine = [block.groups[group] for group in groups]
        totals, partials = _sums(mine)
        live = block.late if way.is_late else block.live
        # Of what is not late: what else there is of a block beside one late linear is small.
        on_device = self._surroundings.has_device and not way.is_late
        loading = {"block": live + block.recast} if on_device else {}
        yield {**always, **loading, "reading": self._reading(block)}
        yield {**always, "block": live, "working": self._working, "statistics": totals + partials}
        solve = solve_bytes(mine, has_batches=way.has_batches)
        sums = {"sums": totals, "merged sums": totals * self._num_merged}
        codes = sum(group.codes for group in mine)
        yield {**always, **ahead, **sums, "codes": codes, "solve": solve}
        if self._runs_quantized:
            made = live + (block.unpacked if way.is_late else block.levels) + ahead["block"]
            if on_device:
                made += block.packed + block.recast
            yield {**always, **ahead, "block": made, "working": self._working}

    def _worst(self, moments: Iterable[dict[str, int]], resident: int) -> _Peak:
        worst = self._placed({}, resident)
        for moment in moments:
            worst = worst.or_worse(self._placed(moment, resident))
        return worst

    def _placed(self, moment: Mapping[str, int], resident: int) -> _Peak:
        """A moment by the places where things are."""
        around = self._surroundings
        needs = {**moment, "activations": resident}
        worker = {"idle": around.idle_bytes, "kept": around.kept_bytes, "records": self.records}
        device, store = {}, {}
        if around.has_device:
            waiting = self.streams - resident
            worker["pinned slots"] = PINNED_SLOTS_BYTES
            worker["waiting activations"] = math.ceil(self._pinned * waiting)
            device[_PASSING] = self._passing if waiting else 0
        for purpose, size in needs.items():
            if purpose in _EXCHANGED and around.store_workers:
                each = around.store_workers if purpose == "sums" else 1
                store[purpose] = size * each
            elif purpose in _ON_DEVICE and around.has_device:
                device[purpose] = size
            else:
                worker[purpose] = size
        return _Peak(worker, device, store)


def _sums(groups: Sequence[GroupNeeds]) -> tuple[int, int]:
    """Bytes of the totals and of the partial sums of groups, and of the pools they share."""
    # A pool is as large as the sums of a group that shares it.
    shared = {group.pool: group for group in groups if group.pool is not None}.values()
    return sum(g.total for g in (*groups, *shared)), sum(g.partial for g in (*groups, *shared))


def _num_merged(around: Surroundings) -> int:
    """Sums on a node beside those of its observers; see `quantlib.job.reduction`."""
    if around.workers <= MAX_DIRECT_BATCHES:
        return 0
    # That of the node, and what the nodes' sums come to: of every band its own, or what a solve has fetched.
    return 1 if around.workers <= around.store_workers or not around.store_workers else 2


def _refusal(least: _Peak, budgets: Budgets) -> RecipeError:
    # What has no room on a GPU waits in its machine's memory: that is only known once the GPU's is enough.
    needed = {
        "device_memory": (least.device, budgets.device),
        "worker_memory": (least.worker, budgets.worker),
        "object_store_memory": (least.store, budgets.store),
    }
    for option, (use, limit) in needed.items():
        if limit is not None and sum(use.values()) > limit:
            purposes = ", ".join(f"{name} {format_bytes(size)}" for name, size in use.items() if size)
            return RecipeError(
                f"{option} must be at least {format_bytes(sum(use.values()))} with as little as possible at"
                f" a time ({purposes}), found {format_bytes(limit)}; allow that much, or use larger machines",
                option=option,
                needed_bytes=sum(use.values()),
            )
    raise AssertionError("every budget is large enough")
