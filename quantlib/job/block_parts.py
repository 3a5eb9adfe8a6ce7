"""What the workers have of blocks: source tensors in parts, packed tensors, live modules."""

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from quantlib.job.bundle import Bundle
from quantlib.job.holdings import Held, Holdings
from quantlib.job.plan import Groups
from quantlib.job.transport import Handle, Transport

# In the place of an input group: a whole block, read back from the output.
_STORED = -1


class BlockParts:
    """Reads, finds and makes what a block's stages need, each thing once; stages call from several threads.

    Args:
        transport: To the workers.
        bundle: Of the job.
        holdings: Where it is noted who has what.
    """

    def __init__(self, transport: Transport, bundle: Bundle, holdings: Holdings) -> None:
        self._transport, self._bundle, self._holdings = transport, bundle, holdings
        self._plan = bundle.shared
        # What a worker has live, by the method that makes it: the block, of which output (0 of all), and the
        # handle of its making.
        self._live: dict[tuple[int, str], tuple[tuple[int, int], Handle]] = {}
        # Worker and block that it was told to bring to its device and did not make live yet -> the handle.
        self._brought: dict[tuple[int, int], Handle] = {}
        # A stage that fails has things read anew while another one, of the next block, lets go of its own.
        self._lock = threading.RLock()

    def read(self, names: Iterable[str]) -> list[Handle]:
        """Source tensors, each worker its part."""
        workers, wanted = self._transport.workers, sorted(names)
        return [
            self._transport.submit(worker, "read", wanted, number, len(workers))
            for number, worker in enumerate(workers)
        ]

    def prefetch(self, block: int) -> None:
        """Start reading what of a block's weights nobody has; does nothing past the last block."""
        if block >= len(self._plan.blocks):
            return
        workers, names = self._transport.workers, sorted(self._plan.blocks[block].tensors)
        with self._lock:
            parts = self._holdings.sources.setdefault(block, [None] * len(workers))
            for number, part in enumerate(parts):
                if part is None:
                    worker = workers[number % len(workers)]
                    handle = self._transport.submit(worker, "read", names, number, len(parts))
                    parts[number] = Held(worker, handle)

    def bring_ahead(self, block: int) -> None:
        """Have all workers begin to bring a block's weights to their devices; does nothing past the last."""
        if block >= len(self._plan.blocks):
            return
        with self._lock:
            for worker in self._transport.workers:
                if (worker, block) not in self._brought:
                    handle = self._transport.submit(worker, "bring_ahead", block, self.sources(block))
                    self._brought[worker, block] = handle

    def sources(self, block: int) -> list[Handle]:
        """A block's source tensors."""
        with self._lock:
            self.prefetch(block)
            return [part.handle for part in self._holdings.sources[block] if part is not None]

    def is_solved(self, block: int, groups: Groups, outputs: Iterable[int]) -> bool:
        """Whether shared input groups were packed for some outputs and are there."""
        return not any(self.unsolved(output, block, groups) for output in outputs)

    def unsolved(self, output: int, block: int, groups: Groups) -> list[int]:
        """An output's input groups that want sums of shared ones and are not packed."""
        packed = self._holdings.outputs[output].packed.get(block, {})
        wanted = enumerate(self._bundle.sums[output][block])
        return [group for group, number in wanted if number in groups and group not in packed]

    def packed(self, output: int, block: int) -> list[Handle]:
        """A block's packed tensors: as solved, or from the output where it was finished before."""
        packed = self._holdings.outputs[output].packed.setdefault(block, {})
        groups = range(len(self._bundle.outputs[output].blocks[block].input_groups))
        if not packed.keys() >= set(groups) and _STORED not in packed:
            worker = self._transport.workers[0]
            unit = self._bundle.outputs[output].block_units[block].name
            handle = self._transport.submit(worker, "read_packed", output, unit)
            self._transport.result(handle)
            packed[_STORED] = Held(worker, handle)
        return [group.handle for group in packed.values()]

    def live(self, worker: int, method: str, block: int, *arguments: Any, output: int = 0) -> Handle:
        """Have a worker make a block live, unless it has; whoever is given the handle raises its error.

        Args:
            arguments: Of the method, behind the block and its source tensors.
            output: As which it is made live.
        """
        with self._lock:
            made, handle = self._live.get((worker, method), (None, None))
            if made != (block, output):
                if method == "load" and (worker, block) in self._brought:
                    arguments = (self._brought.pop((worker, block)), *arguments)
                handle = self._transport.submit(worker, method, block, self.sources(block), *arguments)
                self._live[worker, method] = ((block, output), handle)
            return handle

    def live_head(self, worker: int, parts: Sequence[Handle]) -> Handle:
        """The same of what stands after the last block, which takes the place of all blocks."""
        key, last = (worker, "load_head"), len(self._plan.blocks)
        with self._lock:
            if key not in self._live:
                self._live[key] = ((last, 0), self._transport.submit(worker, "load_head", parts))
            return self._live[key][1]

    def unload(self, block: int) -> None:
        """Have no worker keep a block live."""
        with self._lock:
            for worker, method in [key for key, (made, _) in self._live.items() if made[0] == block]:
                self._transport.submit(worker, "unload", block)
                del self._live[worker, method]
            self._brought = {place: found for place, found in self._brought.items() if place[1] > block}

    def read_anew(self, blocks: Collection[int]) -> None:
        """What could not be read or made is tried again when it is next asked for."""
        with self._lock:
            for block in blocks:
                self._holdings.sources.pop(block, None)
            self._live.clear()
            self._brought.clear()
