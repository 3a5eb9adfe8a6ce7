"""What each worker holds that would be gone with it, so that only that is made again.

Cells are known by their keys, workers by their numbers; a handle stands for a value on a worker.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from quantlib.job.activations import CALIBRATION, corpus_of
from quantlib.job.bands import Band
from quantlib.job.plan import Groups
from quantlib.job.transport import Handle


@dataclass(frozen=True, slots=True)
class Held:
    """A value on a worker.

    Attributes:
        worker: Who has it.
        handle: How others reach it.
        told: What the worker said of it.
    """

    worker: int
    handle: Handle
    told: Any = None


@dataclass(slots=True)
class Holdings:
    """Everything about a job that is not in its work prefix.

    Attributes:
        homes: Cell -> the worker that has its streams.
        moving: Cells on their way to that worker: not known to have come.
        follows: Cell -> the block before which the stream stands that follows the original blocks.
        quantized: Cell -> the same of the stream that runs through quantized blocks.
        observed: Block -> input groups that are summed in one pass -> cell -> who has it in a sum.
        exponents: Block -> input groups likewise -> exponents of their sums.
        bands: Block -> input groups likewise -> how their sums are cut.
        captured: Block -> what its capture gave.
        compared: Block -> evaluation cell -> what the comparison of its streams gave.
        sources: Block -> parts of its source tensors.
        packed: Block -> input group -> its packed tensors; ``told`` are the rows of the report.
        solved: Block -> row tile -> its codes, until the input group that it is of is packed.
    """

    homes: dict[str, int] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)
    follows: dict[str, int] = field(default_factory=dict)
    quantized: dict[str, int] = field(default_factory=dict)
    observed: dict[int, dict[Groups, dict[str, Held]]] = field(default_factory=dict)
    exponents: dict[int, dict[Groups, list[int]]] = field(default_factory=dict)
    bands: dict[int, dict[Groups, list[Band]]] = field(default_factory=dict)
    captured: dict[int, dict[str, Any]] = field(default_factory=dict)
    compared: dict[int, dict[str, Any]] = field(default_factory=dict)
    sources: dict[int, list[Held | None]] = field(default_factory=dict)
    packed: dict[int, dict[int, Held]] = field(default_factory=dict)
    solved: dict[int, dict[int, Held]] = field(default_factory=dict)

    def place(self, keys: Iterable[str], block: int) -> None:
        """The streams of some cells stand before a block."""
        for key in keys:
            self.follows[key] = self.quantized[key] = block

    def release(self, block: int) -> None:
        """A block is written and passed by every stream."""
        for kept in (
            self.observed,
            self.exponents,
            self.bands,
            self.captured,
            self.compared,
            self.sources,
            self.packed,
            self.solved,
        ):
            kept.pop(block, None)

    def lose(self, gone: Collection[int]) -> None:
        """Some workers are gone: forget what they had, and the cells that must be brought up again.

        A cell must be brought up again when its streams are gone, when a sum is gone that it is in, and when
        it has passed a block of which codes are gone whose sums are not kept, or do not hold it. The sums of
        an input group that is not packed are kept: its tiles that are gone need nothing else.
        """
        lost = self.moving | {key for key, worker in self.homes.items() if worker in gone}
        self.moving = set()
        for block, groups in self.packed.items():
            missing = [group for group, held in groups.items() if held.worker in gone]
            for group in missing:
                del groups[group]
            if block in self.captured:
                for group in missing:
                    lost |= self._passed_unobserved(block, group)
        for cells in [cells for passes in self.observed.values() for cells in passes.values()]:
            for key in [key for key, held in cells.items() if held.worker in gone]:
                lost.add(key)
                del cells[key]
        for tiles in self.solved.values():
            for tile in [tile for tile, held in tiles.items() if held.worker in gone]:
                del tiles[tile]
        for key in lost:
            for kept in (self.homes, self.follows, self.quantized):
                kept.pop(key, None)
        for parts in self.sources.values():
            parts[:] = [None if part is None or part.worker in gone else part for part in parts]

    def _passed_unobserved(self, block: int, group: int) -> set[str]:
        """Calibration cells beyond a block that are not in the sums of one of its input groups."""
        passes = self.observed.get(block, {})
        observed = {key for groups, cells in passes.items() if group in groups for key in cells}
        return {
            key
            for key in self.homes
            if corpus_of(key) == CALIBRATION
            and key not in observed
            and max(self.follows[key], self.quantized[key]) > block
        }
