"""The sums of all observers made one before anything is solved: who adds what, and how it travels.

First the workers of a node add what is on that node, which is mapped there, then the nodes' sums meet: of a
sum as many bytes cross the network as there are nodes, however many workers. Every band has an owner, who
shares what it comes to. Between nodes bands go through torch.distributed, from memory to memory, or, where
that fails, through the object store. Sums are exact, so that no way of adding them changes a bit.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quantlib.errors import WorkerLostError
from quantlib.job.bands import MAX_DIRECT_BATCHES, Band, rails_of
from quantlib.job.shares import share_by_cost
from quantlib.job.transport import Handle, Transport, results

_LOG = logging.getLogger(__name__)

DIRECT, SHARED_MEMORY, OBJECT_STORE = "direct", "shared memory", "object store"


@dataclass(frozen=True, slots=True)
class Batch:
    """Sums over cells that one worker observed.

    Attributes:
        worker: Who has them.
        bands: A handle for every band.
    """

    worker: int
    bands: Sequence[Handle]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Who adds what.

    Attributes:
        batches: Of every node that has some.
        rails: Groups of one worker a node, in the order of the nodes.
        by_rail: The bands of each rail.
        owners: Of every band, the place within its rail of the worker that shares it.
    """

    batches: list[list[Batch]]
    rails: list[list[int]]
    by_rail: list[list[int]]
    owners: dict[int, int]


class Reduction:
    """Adds up the sums of a job's observers, time and again.

    Args:
        transport: How to reach them.

    Attributes:
        paths: By which way sums met -> how often. Where there are several nodes it is the way between them.
        fallbacks: Why torch.distributed was given up, each time it was.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.paths: Counter[str] = Counter()
        self.fallbacks: list[str] = []
        self._rails: list[list[int]] = []
        self._is_joined = False

    def forget_groups(self) -> None:
        """Form groups anew the next time: some worker is gone."""
        self._rails, self._is_joined = [], False

    def merged(self, bands: Sequence[Band], batches: Sequence[Batch]) -> list[list[Handle]]:
        """Add up batches, band by band.

        Returns:
            What is left to be added by whoever solves: batches, each with a handle of every band.

        Raises:
            WorkerLostError: A worker that had sums, or was to add some, is gone.
            NumericsError: A sum leaves its range.
        """
        if len(batches) <= MAX_DIRECT_BATCHES:
            self.paths[DIRECT] += 1
            return [list(batch.bands) for batch in batches]
        layout = self._layout(bands, batches)
        sums = self._added_on_nodes(layout, len(bands))
        if len(sums) == 1:
            self.paths[SHARED_MEMORY] += 1
            return sums
        return [self._through_groups(layout, sums) or self._through_store(layout, sums)]

    def _layout(self, bands: Sequence[Band], batches: Sequence[Batch]) -> _Layout:
        on_node: dict[str, list[Batch]] = {}
        for batch in batches:
            on_node.setdefault(self._transport.node_of(batch.worker), []).append(batch)
        # In one order, whoever observed: groups last as long as their members do.
        nodes = sorted(on_node)
        workers, node_of = self._transport.workers, self._transport.node_of
        rails = rails_of({node: [w for w in workers if node_of(w) == node] for node in nodes})
        shares = share_by_cost([band.size_bytes for band in bands], len(rails) * len(nodes))
        by_rail: list[list[int]] = [[] for _ in rails]
        owners = {}
        for place, share in enumerate(shares):
            node, rail = divmod(place, len(rails))
            by_rail[rail] += share
            owners.update(dict.fromkeys(share, node))
        # Every member of a rail goes through its bands in this one order.
        return _Layout([on_node[node] for node in nodes], rails, [sorted(mine) for mine in by_rail], owners)

    def _added_on_nodes(self, layout: _Layout, num_bands: int) -> list[list[Handle]]:
        """A handle of every band for every node."""
        sums: list[list[Handle]] = []
        started = []
        for node, batches in enumerate(layout.batches):
            sums.append(list(batches[0].bands) if len(batches) == 1 else [None] * num_bands)
            if len(batches) > 1:
                for rail, mine in _with_bands(layout):
                    given = [[batch.bands[band] for batch in batches] for band in mine]
                    started.append((sums[node], mine, self._add(rail[node], given)))
        self._place(started)
        return sums

    def _through_store(self, layout: _Layout, sums: Sequence[Sequence[Handle]]) -> list[Handle]:
        found: list[Handle] = [None] * len(sums[0])
        started = []
        for rail, bands in _with_bands(layout):
            for place, worker in enumerate(rail):
                mine = [band for band in bands if layout.owners[band] == place]
                given = [[node[band] for node in sums] for band in mine]
                started.append((found, mine, self._add(worker, given)))
        self._place(started)
        self.paths[OBJECT_STORE] += 1
        return found

    def _through_groups(self, layout: _Layout, sums: Sequence[Sequence[Handle]]) -> list[Handle] | None:
        """None when it cannot be done in this way; what was given is as it was."""
        if layout.rails != self._rails:
            self._rails, self._is_joined = layout.rails, self._join(layout.rails)
        if not self._is_joined:
            return None
        started = [
            (bands, self._transport.submit(worker, "reduce_bands", given, owners))
            for rail, bands in _with_bands(layout)
            for owners in [[layout.owners[band] for band in bands]]
            for worker, node in zip(rail, sums, strict=True)
            for given in [[node[band] for band in bands]]
        ]
        answers = self._all_ended([handle for _, handle in started])
        if failures := [answer["failure"] for answer in answers if answer["failure"]]:
            self._give_up(failures[0])
            return None
        found: list[Handle] = [None] * len(sums[0])
        for (bands, _), answer in zip(started, answers, strict=True):
            for band, handle in zip(bands, answer["bands"], strict=True):
                found[band] = handle if handle is not None else found[band]
        self.paths[answers[0]["path"]] += 1
        return found

    def _join(self, rails: Sequence[Sequence[int]]) -> bool:
        submit = self._transport.submit
        addresses = results(self._transport, [submit(rail[0], "host_group") for rail in rails])
        joining = [
            submit(worker, "join_group", address, rank, len(rail))
            for rail, address in zip(rails, addresses, strict=True)
            for rank, worker in enumerate(rail)
        ]
        failures = [failure for failure in self._all_ended(joining) if failure]
        if failures:
            self._give_up(failures[0])
        return not failures

    def _give_up(self, failure: str) -> None:
        self._is_joined = False
        self.fallbacks.append(failure)
        _LOG.warning("statistics go from node to node through the object store: %s", failure)

    def _all_ended(self, handles: Sequence[Handle]) -> list:
        """All results; a loss is told of when nobody waits for the lost one any more."""
        found, lost = [], None
        for handle in handles:
            try:
                found.append(self._transport.result(handle))
            except WorkerLostError as error:
                lost = lost or error
        if lost is not None:
            raise lost
        return found

    def _add(self, worker: int, given: Sequence[Sequence[Handle]]) -> Handle:
        return self._transport.submit(worker, "add_bands", given)

    def _place(self, started: Sequence[tuple[list[Handle], Sequence[int], Handle]]) -> None:
        """Put what was added where it belongs."""
        added = results(self._transport, [handle for _, _, handle in started])
        for (sums, bands, _), handles in zip(started, added, strict=True):
            for band, handle in zip(bands, handles, strict=True):
                sums[band] = handle


def _with_bands(layout: _Layout) -> list[tuple[list[int], list[int]]]:
    """Rails that have something to add, and what."""
    return [pair for pair in zip(layout.rails, layout.by_rail, strict=True) if pair[1]]
