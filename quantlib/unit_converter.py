"""One unit without data, from storage to storage: reading, rounding and writing run side by side.

A unit is taken in parts: the linears of an input group, or some tensors that are copied. While one part is
rounded the next two are read, and what is finished goes out in the order of the file. The end of a shard is
sent while the next unit begins. In memory are at most three parts of the source, and of two shards what was
made and not sent yet.
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.shard_forms import ShardForms
from quantlib.checkpoint.writer import ShardReceipt, ShardWriter
from quantlib.errors import PackingError
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan, UnitPlan
from quantlib.memory_ladder import MemoryLadder
from quantlib.rounded_ends import rounded_blocks
from quantlib.stage_clock import StageClock
from quantlib.steps import split_biases
from quantlib.storage import Store

# With two, one is asked for while the last bytes of the other arrive.
_PARTS_AHEAD = 2
# Copied tensors are read together until they are this many: as many as one request brings.
_COPIED_BYTES = 32 << 20
_NO_TOKENS = GroupTokens(own=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """What is read, made and handed to the writer in one go.

    Attributes:
        sources: Names of its source tensors.
        groups: Numbers of the input groups whose weights they are; none of biases and what is copied or
            rounded outside the blocks.
    """

    sources: tuple[str, ...]
    groups: tuple[int, ...] = ()


def parts_of(unit: UnitPlan, block: BlockPlan | None, num_bytes: Callable[[str], int]) -> list[UnitPart]:
    """A unit in parts, about in the order in which the file wants them.

    Args:
        block: The unit's, if it has one.
        num_bytes: Of a source tensor.
    """
    parts: list[UnitPart] = []
    waiting: list[str] = []
    for name in sorted(unit.sources):
        waiting.append(name)
        if sum(map(num_bytes, waiting)) >= _COPIED_BYTES:
            parts.append(UnitPart(sources=tuple(waiting)))
            waiting = []
    if waiting:
        parts.append(UnitPart(sources=tuple(waiting)))
    if block is not None:
        parts += _weight_parts(block)
        if biases := dict.fromkeys(x.split_bias.tensor for x in block.linears if x.split_bias is not None):
            parts.append(UnitPart(sources=tuple(biases)))
    return sorted(parts, key=lambda part: min(part.sources))


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunShard:
    """A shard whose tensors are all made.

    Attributes:
        receipt: What is stored, once it is; or the error of writing.
        rows: The report rows of the linears, by input group.
    """

    receipt: Future[ShardReceipt]
    rows: list[dict[str, Any]]


class UnitConverter:
    """Converts units, one at a time, and writes them one after the other.

    Args:
        checkpoint: The source.
        source_store: Where it lies.
        output_store: Where shards go.
        forms: What they are as files.
        solver: Quantizes and packs an input group.
        clock: Is told what reading and writing take.
        working: A context for what a stage computes; it raises when the job was stopped.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source_store: Store,
        output_store: Store,
        forms: ShardForms,
        solver: MemoryLadder,
        clock: StageClock,
        working: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._checkpoint, self._solver = checkpoint, solver
        self._source_store, self._output_store, self._forms = source_store, output_store, forms
        self._clock, self._working = clock, working
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="unit-write")

    def convert(self, unit: UnitPlan, block: BlockPlan | None, uri: str) -> BegunShard:
        """Make the tensors of a unit; they are stored meanwhile and thereafter.

        Args:
            block: The unit's, if it has one.
            uri: Address of the shard.

        Raises:
            QuantError: From reading or rounding; no shard is stored then.
        """
        made: dict[str, Future[torch.Tensor]] = {spec.name: Future() for spec in unit.tensors}
        rows: dict[int, list[dict[str, Any]]] = {}
        receipt = self._writer.submit(self._write, unit, uri, dict(made))
        error: BaseException | None = None
        try:
            with closing(self._read(parts_of(unit, block, self._num_bytes))) as parts:
                for part, tensors in parts:
                    if receipt.done():
                        break  # it failed
                    rows |= self._make(part, unit, block, tensors, made)
                    del tensors  # else it stays while the next is waited for
        except BaseException as failed:
            error = failed
            raise
        finally:
            # Else the writer would wait for ever.
            for name, future in made.items():
                future.set_exception(error or PackingError(f"tensor {name!r} was promised and not made"))
            if error is not None:
                wait([receipt])
        reports = [row for group in sorted(rows) for row in rows[group]]
        return BegunShard(receipt=receipt, rows=reports)

    def _num_bytes(self, name: str) -> int:
        return self._checkpoint.tensors[name].memory_bytes

    def _read(self, parts: Sequence[UnitPart]) -> Generator[tuple[UnitPart, dict[str, torch.Tensor]]]:
        """Every part with its tensors, some parts read ahead."""

        def read(part: UnitPart) -> dict[str, torch.Tensor]:
            with self._clock.storage("read"):
                return read_tensors(self._source_store, self._checkpoint, part.sources)

        ahead: deque[tuple[UnitPart, Future[dict[str, torch.Tensor]]]] = deque()
        with ThreadPoolExecutor(_PARTS_AHEAD, thread_name_prefix="unit-read") as threads:
            for part in parts:
                ahead.append((part, threads.submit(read, part)))
                if len(ahead) > _PARTS_AHEAD:
                    yield _ended(*ahead.popleft())
            while ahead:
                yield _ended(*ahead.popleft())

    def _make(
        self,
        part: UnitPart,
        unit: UnitPlan,
        block: BlockPlan | None,
        tensors: Mapping[str, torch.Tensor],
        made: dict[str, Future[torch.Tensor]],
    ) -> dict[int, list[dict[str, Any]]]:
        """Hand the tensors that come of a part to the writer; gives the report rows of its input groups."""
        rows: dict[int, list[dict[str, Any]]] = {}
        for group in part.groups:
            assert block is not None, "a unit with input groups has a block"
            with self._working("solve"):
                packed, rows[group] = self._solver.solve(block, group, tensors, ([], [], []), _NO_TOKENS)
            _hand_over(packed, made)
        if not part.groups:
            others = split_biases(block, tensors) | rounded_blocks(unit.rounded, tensors)
            _hand_over({**tensors, **others}, made)
        return rows

    def _write(self, unit: UnitPlan, uri: str, made: dict[str, Future[torch.Tensor]]) -> ShardReceipt:
        with ShardWriter(self._output_store, uri, unit.tensors, self._forms.of(unit)) as shard:
            for spec in unit.tensors:
                # Popped: what was sent is not kept.
                tensor = made.pop(spec.name).result()
                with self._clock.storage("write"):
                    shard.add(tensor)
        return shard.receipt


def _weight_parts(block: BlockPlan) -> list[UnitPart]:
    """The weights of input groups; together those that read parts of one tensor."""
    linears = {linear.name: linear for linear in block.linears}
    parts: dict[str, UnitPart] = {}
    for number, names in enumerate(block.input_groups):
        sources = tuple(dict.fromkeys(linears[name].weight.tensor for name in names))
        others = [parts.pop(name) for name in sources if name in parts]
        others = list({id(part): part for part in others}.values())
        every = tuple(dict.fromkeys((*(s for part in others for s in part.sources), *sources)))
        groups = (*(group for part in others for group in part.groups), number)
        merged = UnitPart(sources=every, groups=tuple(sorted(groups)))
        parts.update(dict.fromkeys(every, merged))
    return list({id(part): part for part in parts.values()}.values())


def _hand_over(tensors: Mapping[str, torch.Tensor], made: dict[str, Future[torch.Tensor]]) -> None:
    for name in [name for name in tensors if name in made]:
        made.pop(name).set_result(tensors[name])


def _ended(
    part: UnitPart, reading: Future[dict[str, torch.Tensor]]
) -> tuple[UnitPart, dict[str, torch.Tensor]]:
    # A function, so that nobody keeps the future, which keeps the tensors.
    return part, reading.result()
