"""What each worker holds that would be gone with it, so that only that is made again.

Cells are known by their keys, workers by their numbers; a handle stands for a value on a worker.
"""

from collections.abc import Collection, Iterable, Sequence
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
class OutputHoldings:
    """What is there of one output.

    Attributes:
        sums: Of every block, the number of the sums that each of its input groups wants; its own where
            nothing is said.
        quantized: Cell -> the block before which the stream stands that runs through quantized blocks.
        compared: Block -> evaluation cell -> what the comparison of its streams gave.
        packed: Block -> input group -> its packed tensors; ``told`` are the rows of the report.
        solved: Block -> row tile -> its codes, until the input group that it is of is packed.
    """

    sums: Sequence[Sequence[int]] = ()
    quantized: dict[str, int] = field(default_factory=dict)
    compared: dict[int, dict[str, Any]] = field(default_factory=dict)
    packed: dict[int, dict[int, Held]] = field(default_factory=dict)
    solved: dict[int, dict[int, Held]] = field(default_factory=dict)

    def sums_of(self, block: int, group: int) -> int:
        """The shared input group whose sums one of its own wants."""
        numbers = self.sums[block] if self.sums else ()
        return numbers[group] if 0 <= group < len(numbers) else group


def _one_output() -> list[OutputHoldings]:
    return [OutputHoldings()]


@dataclass(slots=True)
class Holdings:
    """Everything about a job that is not in its work prefix.

    Attributes:
        outputs: What is there of each output.
        homes: Cell -> the worker that has its streams.
        moving: Cells on their way to that worker: not known to have come.
        follows: Cell -> the block before which the stream stands that follows the original blocks.
        observed: Block -> input groups that are summed in one pass -> cell -> who has it in a sum.
        exponents: Block -> input groups likewise -> exponents of their sums.
        bands: Block -> input groups likewise -> how their sums are cut.
        captured: Block -> what its capture gave.
        sources: Block -> parts of its source tensors.
    """

    outputs: list[OutputHoldings] = field(default_factory=_one_output)
    homes: dict[str, int] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)
    follows: dict[str, int] = field(default_factory=dict)
    observed: dict[int, dict[Groups, dict[str, Held]]] = field(default_factory=dict)
    exponents: dict[int, dict[Groups, list[int]]] = field(default_factory=dict)
    bands: dict[int, dict[Groups, list[Band]]] = field(default_factory=dict)
    captured: dict[int, dict[str, Any]] = field(default_factory=dict)
    sources: dict[int, list[Held | None]] = field(default_factory=dict)

    def place(self, keys: Iterable[str], block: int) -> None:
        """The streams of some cells stand before a block."""
        for key in keys:
            self.follows[key] = block
            for output in self.outputs:
                output.quantized[key] = block

    def release(self, block: int) -> None:
        """A block is written and passed by every stream."""
        shared = (self.observed, self.exponents, self.bands, self.captured, self.sources)
        own = [kept for output in self.outputs for kept in (output.compared, output.packed, output.solved)]
        for kept in (*shared, *own):
            kept.pop(block, None)

    def lose(self, gone: Collection[int]) -> None:
        """Some workers are gone: forget what they had, and the cells that must be brought up again.

        A cell must be brought up again when its streams are gone, when a sum is gone that it is in, and when
        it has passed a block of which codes are gone whose sums are not kept, or do not hold it. The sums of
        an input group that is not packed are kept: its tiles that are gone need nothing else.
        """
        lost = self.moving | {key for key, worker in self.homes.items() if worker in gone}
        self.moving = set()
        for output in self.outputs:
            lost |= self._lose_codes(output, gone)
        for cells in [cells for passes in self.observed.values() for cells in passes.values()]:
            for key in [key for key, held in cells.items() if held.worker in gone]:
                lost.add(key)
                del cells[key]
        for key in lost:
            for kept in (self.homes, self.follows, *(output.quantized for output in self.outputs)):
                kept.pop(key, None)
        for parts in self.sources.values():
            parts[:] = [None if part is None or part.worker in gone else part for part in parts]

    def _lose_codes(self, output: OutputHoldings, gone: Collection[int]) -> set[str]:
        """Cells that must be brought up again for codes that are gone."""
        lost: set[str] = set()
        for block, groups in output.packed.items():
            missing = [group for group, held in groups.items() if held.worker in gone]
            for group in missing:
                del groups[group]
            if block in self.captured:
                for group in missing:
                    lost |= self._passed_unobserved(block, output.sums_of(block, group))
        for tiles in output.solved.values():
            for tile in [tile for tile, held in tiles.items() if held.worker in gone]:
                del tiles[tile]
        return lost

    def _passed_unobserved(self, block: int, group: int) -> set[str]:
        """Calibration cells beyond a block that are not in the sums of one of its shared input groups."""
        passes = self.observed.get(block, {})
        observed = {key for groups, cells in passes.items() if group in groups for key in cells}
        return {
            key
            for key in self.homes
            if corpus_of(key) == CALIBRATION
            and key not in observed
            and max(self.follows[key], *(output.quantized[key] for output in self.outputs)) > block
        }
