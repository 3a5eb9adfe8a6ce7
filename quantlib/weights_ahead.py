"""Source tensors of blocks on the device: those of the next block come while one is worked on.

On a CPU they are where they were read.
"""

import logging
import threading
from collections.abc import Container, Mapping

import torch

from quantlib.device_copies import DeviceCopies, Pending

_LOG = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]


class WeightsAhead:
    """What is on its way to the device, by block; one thread begins what another one takes.

    Args:
        device: Where blocks are live.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = DeviceCopies(device)
        self._coming: dict[int, Pending] = {}
        self._lock = threading.Lock()

    def begin(self, block: int, tensors: Tensors) -> None:
        """Begin to bring the tensors of a block; takes as long as reading them.

        Of what was begun before only the block before this one may still be taken. Where the device has less
        room than planned nothing is begun: `take` brings them.
        """
        with self._lock:
            self._coming = {other: found for other, found in self._coming.items() if other == block - 1}
        try:
            pending = self._copies.begin(tensors)
        except torch.OutOfMemoryError as error:
            _LOG.warning("block %d: its weights do not come to the device ahead: %s", block + 1, error)
            return
        with self._lock:
            self._coming[block] = pending

    def take(self, block: int, tensors: Tensors, but: Container[str] = ()) -> dict[str, torch.Tensor]:
        """The tensors of a block, on the device; what was begun of blocks before it is let go of.

        Args:
            tensors: The same that were begun, if they were.
            but: Names of tensors that stay where they are.
        """
        with self._lock:
            begun = self._coming.get(block)
            self._coming = {other: found for other, found in self._coming.items() if other > block}
        if begun is None:
            begun = self._copies.begin({name: found for name, found in tensors.items() if name not in but})
        return {**tensors, **begun.wait()}

    def bring(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Any tensors, on the device."""
        return self._copies.begin(tensors).wait()

    def forget(self) -> None:
        """Let go of all that was begun."""
        with self._lock:
            self._coming = {}
