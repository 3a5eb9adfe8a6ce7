"""A checkpoint as the weights it means, quantized or not.

For an original checkpoint that is the tensors themselves. For a quantized one, ``<linear>.weight`` stands for
the levels its packed tensors describe; the packed names are hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch

from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.errors import CheckpointError
from quantlib.packing import format_of
from quantlib.storage import Store


class DecodedCheckpoint:
    """Weights by their original names.

    Args:
        store: Where the checkpoint lies.
        checkpoint: Original, or quantized in a format this tool can read.

    Raises:
        CheckpointError: It is quantized in a way that cannot be read.
    """

    def __init__(self, store: Store, checkpoint: Checkpoint) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._quantization: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        self._packer = format_of(checkpoint.config)
        if self._quantization and self._packer is None:
            method = self._quantization.get("quant_method")
            raise CheckpointError(
                f"{checkpoint.uri} is quantized by {method!r}, which cannot be read; compressed-tensors"
                " pack-quantized and gptq can",
                uri=checkpoint.uri,
            )
        self._packed = self._find_packed()

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the model that is meant, without the quantization."""
        return {k: v for k, v in self._checkpoint.config.items() if k != "quantization_config"}

    @property
    def names(self) -> list[str]:
        """Original names of all tensors."""
        hidden = {name for parts in self._packed.values() for name in parts}
        plain = [name for name in self._checkpoint.tensors if name not in hidden]
        return plain + [f"{linear}.weight" for linear in self._packed]

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is stored under its own name, not packed."""
        return name in self._checkpoint.tensors

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by original name: plain ones in their stored dtype, quantized ones as fp32 levels."""
        linears = [name.removesuffix(".weight") for name in names]
        packed = [linear for linear in linears if linear in self._packed]
        wanted = [name for name in names if name.removesuffix(".weight") not in self._packed]
        wanted += [part for linear in packed for part in self._packed[linear]]
        tensors = read_tensors(self._store, self._checkpoint, wanted)
        for linear in packed:
            levels_RC = self._levels(linear, tensors)
            for part in self._packed[linear]:
                del tensors[part]
            tensors[f"{linear}.weight"] = levels_RC
        return tensors

    def _levels(self, linear: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self._packer is not None, "only a packer finds packed tensors"
        scheme = self._packer.scheme_of(self._quantization, linear)
        if scheme is None:
            raise CheckpointError(
                f"{linear} is stored packed, but quantization_config says it is not quantized;"
                f" {self._checkpoint.uri} contradicts itself",
                linear=linear,
            )
        return self._packer.unpack(linear, tensors, scheme).dequantize()

    def _find_packed(self) -> dict[str, list[str]]:
        """Linear -> its packed tensors, for every linear that has any."""
        if self._packer is None:
            return {}
        suffixes = [name.removeprefix("x.") for name in self._packer.packed_names("x")]
        packed: dict[str, list[str]] = {}
        for name in self._checkpoint.tensors:
            linear, _, last = name.rpartition(".")
            if last in suffixes:
                packed.setdefault(linear, []).append(name)
        return packed
