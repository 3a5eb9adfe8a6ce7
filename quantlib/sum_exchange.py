"""A worker's part in adding up the sums of all observers; see `quantlib.job.reduction`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantlib.calibration.totals import BandSum, Total, added
from quantlib.errors import NumericsError
from quantlib.job.bands import Band
from quantlib.job.plan import Groups
from quantlib.rail_group import GroupFailure, RailGroup


class SumExchange:
    """What this worker has observed, as others may ask for it, and what it adds for them.

    Args:
        share: Makes a value available to other workers.
        host: Address of this machine that other nodes reach.
    """

    def __init__(self, share: Callable[[Any], Any], host: str) -> None:
        self._share, self._host = share, host
        self._batches: dict[tuple[int, Groups], list[tuple[list[Any], list[str]]]] = {}
        self._group: RailGroup | None = None

    def open(self, device: torch.device) -> None:
        """Begin without sums and without a group."""
        self._batches = {}
        self._group = RailGroup(self._host, device)

    def offer(
        self, block: int, groups: Groups, bands: Sequence[Band], totals: Sequence[Total], keys: list[str]
    ) -> list[tuple[list[Any], list[str]]]:
        """Share sums, if they are over any cell; gives those of all offers: every band, and the cells."""
        batches = self._batches.setdefault((block, groups), [])
        if keys:
            batches.append(
                ([self._share(totals[band.total].band(band.first, band.end)) for band in bands], keys)
            )
        return batches

    def forget(self, block: int, groups: Groups | None = None) -> None:
        """Nobody needs the sums of some input groups of a block, all by default, any more."""
        for key in [key for key in self._batches if key[0] == block and groups in (None, key[1])]:
            del self._batches[key]

    def add(self, bands: Sequence[Sequence[BandSum]]) -> list[Any]:
        """Add up bands that others share, and share what each comes to.

        Raises:
            NumericsError: A sum leaves its range.
        """
        return [self._share(added(sums)) for sums in bands]

    def host_group(self) -> tuple[str, int] | None:
        """Where members of a group find each other; None when no port can be had here."""
        try:
            return self._joined_group.host()
        except GroupFailure:
            return None

    def join_group(self, address: tuple[str, int] | None, rank: int, size: int) -> str | None:
        """Be in a new group, instead of the one there was; tells what went wrong, if anything."""
        if address is None:
            return "the first worker of a group found no port to be reached at"
        try:
            self._joined_group.join(address, rank, size)
        except GroupFailure as error:
            self._joined_group.leave()
            return self._told(error)
        return None

    def reduce(self, bands: Sequence[BandSum], owners: Sequence[int]) -> dict[str, Any]:
        """Add up bands with the other members.

        Args:
            owners: Of every band the member that shares what it comes to.

        Returns:
            ``path`` for the report; ``bands``, of which the others' are None; ``failure``, what went wrong:
            then the bands are of no use, and the group is left.
        """
        group, shared = self._joined_group, []
        try:
            for band in group.reduce(bands, owners):
                shared.append(None if band is None else self._share(band))
        except (GroupFailure, NumericsError) as error:
            group.leave()
            return {"path": group.backend, "bands": [], "failure": self._told(error)}
        return {"path": group.backend, "bands": shared, "failure": None}

    @property
    def _joined_group(self) -> RailGroup:
        assert self._group is not None, "open(device) comes first"
        return self._group

    def _told(self, error: Exception) -> str:
        return f"{self._joined_group.backend} on {self._host}: {str(error).splitlines()[0]}"
