"""What every output format does. A format is a module with these names; nothing else of it is used.

Names of linears are full module names (``model.layers.0.mlp.down_proj``), names of tensors are full
checkpoint names. A format writes the weight of a linear only: its bias, where there is one, is written under
``<linear>.bias`` by whoever writes the other tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme


class PackingFormat(Protocol):
    """A layout of quantized linears in a checkpoint."""

    @property
    def NAME(self) -> str:
        """What people type after ``--format``."""
        ...

    @property
    def FORMAT_VERSION(self) -> str:
        """Changes whenever this module would write other bytes for the same quantized linear."""
        ...

    @property
    def WIDTHS(self) -> tuple[int, ...]:
        """Bits of the integer codes that the layout holds."""
        ...

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in, to which methods round them before they choose codes."""
        ...

    def check(self, name: str, rows: int, columns: int, scheme: WeightScheme) -> None:
        """Raise PackingError when the layout cannot hold such a linear."""
        ...

    def pack(self, name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
        """The tensors to write, contiguous; also on the meta device, with the same dtypes and shapes.

        Raises:
            PackingError: The quantized linear does not fit the layout, or contradicts its scheme.
        """
        ...

    def packed_names(self, name: str) -> tuple[str, ...]:
        """Full names of all tensors a quantized linear may consist of; some exist for some schemes only."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
        """The very linear that was packed: equal codes and zeros, scales bit for bit.

        Raises:
            PackingError: A tensor is missing or contradicts the scheme.
        """
        ...

    def quantization_config(
        self, schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config`` of config.json, JSON values.

        Args:
            schemes: Every linear in the blocks, in model order; None for one that is kept as it is.
            other_linears: Every linear outside the blocks (``lm_head``, tied or not); all are kept.

        Raises:
            PackingError: Nothing is quantized, or the layout cannot say what is asked of it.
        """
        ...

    def scheme_of(self, quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
        """How the linear ``name`` is stored according to a ``quantization_config``; None when it is kept.

        Reads the blocks of other tools too where they use this layout.

        Raises:
            PackingError: The block describes something this module cannot unpack.
        """
        ...

    def side_files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        """File name -> content of what the layout wants beside config.json."""
        ...
