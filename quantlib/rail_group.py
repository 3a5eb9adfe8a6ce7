"""One worker of every node, adding up sums together through torch.distributed.

A group is an object of its own, not the default group of the process, so that it can be given up and formed
anew at any stage boundary. Nothing that is given is changed: whoever gives a group up still has it all.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from quantlib.calibration.fixed_point import LIMIT
from quantlib.calibration.totals import BandSum
from quantlib.errors import NumericsError

# All members are asked at once; what keeps one is at most a cell that it gives to another worker.
FORM_TIMEOUT_S = 60.0
# For one panel of at most 1.5 GB, the others perhaps still taking theirs from shared memory.
STEP_TIMEOUT_S = 120.0

# What torch raises when a member is gone, silent or out of reach: all its own errors are of this class.
GroupFailure = RuntimeError


class RailGroup:
    """A member of a group; without one until `join`.

    Args:
        host: Address of this machine that other nodes reach.
        device: Where sums are added: by NCCL on a GPU, else by gloo.
    """

    def __init__(self, host: str, device: torch.device) -> None:
        self._host, self._device = host, device
        self._server: Any = None
        self._group: Any = None

    @property
    def backend(self) -> str:
        """Its name in the report."""
        return "nccl" if self._device.type == "cuda" else "gloo"

    def host(self) -> tuple[str, int]:
        """Let members find each other here, at a free port; the address is for `join`."""
        self._server = TCPStore(
            self._host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=FORM_TIMEOUT_S)
        )
        return self._host, self._server.port

    def join(self, address: tuple[str, int], rank: int, size: int) -> None:
        """Leave the group there was, and wait for all members of a new one.

        Args:
            address: From `host` of the first member.

        Raises:
            GroupFailure: A member does not come or cannot be reached.
        """
        self._group = None
        store = self._server
        if rank > 0:
            self._server, timeout = None, timedelta(seconds=FORM_TIMEOUT_S)
            store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
        form = _nccl_group if self._device.type == "cuda" else _gloo_group
        self._group = form(store, rank, size, self._host)
        # Nobody counts on the group before every member has heard from every other.
        self._largest_together([0])
        self._rank, self._size = rank, size

    def leave(self) -> None:
        """Be in no group."""
        self._group = None

    def reduce(self, sums: Sequence[BandSum], owners: Sequence[int]) -> Iterator[BandSum | None]:
        """Add up bands of all members, in this order.

        Args:
            sums: Of this member; the same bands at every member.
            owners: Of every band, who gets what it comes to.

        Yields:
            On the CPU what a band comes to, or None where it is another member's.

        Raises:
            GroupFailure: A member is gone or silent.
            NumericsError: The sums together might leave their range, which adding them one by one would tell.

        Cost: memory of a panel, and of the band that is yielded.
        """
        largest = self._largest_together([band.largest() for band in sums])
        if largest * self._size >= LIMIT:
            raise NumericsError(
                f"sums of {self._size} nodes may not exceed {LIMIT} together, and one reaches {largest}; add"
                " them one by one"
            )
        for band, owner in zip(sums, owners, strict=True):
            panels = [self._reduced(panel_PL, owner) for panel_PL in band.panels]
            yield band.with_panels(panels) if owner == self._rank else None

    def _reduced(self, panel_PL: torch.Tensor, owner: int) -> torch.Tensor:
        """At others than the owner what is given means nothing."""
        copy_PL = panel_PL.to(self._device, copy=True)
        options = dist.ReduceOptions()
        options.reduceOp, options.rootRank = dist.ReduceOp(dist.ReduceOp.SUM), owner
        options.timeout = timedelta(seconds=STEP_TIMEOUT_S)
        self._group.reduce([copy_PL], options).wait()
        return copy_PL.cpu() if owner == self._rank else copy_PL[:0]

    def _largest_together(self, numbers: Sequence[int]) -> int:
        found = torch.tensor([max(numbers, default=0)], dtype=torch.int64, device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        options.timeout = timedelta(seconds=STEP_TIMEOUT_S)
        self._group.allreduce([found], options).wait()
        return int(found.item())


def _gloo_group(store: Any, rank: int, size: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    # Bound to the address that the others were told, not to whatever the host's name resolves to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: Any, rank: int, size: int, _: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=STEP_TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)
