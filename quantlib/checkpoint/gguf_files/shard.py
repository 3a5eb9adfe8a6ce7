"""One part of a split GGUF file: its header before there is any tensor, and tensors as it holds them.

A unit of a job is a part, named and numbered as gguf-split does: parts are written in any order and each
once, and llama.cpp opens them all when it is given the first, which holds the key-values of the model.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, Keys

from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.checkpoint.gguf_files.names import StoredName
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.layout import ShardLayout, spec_bytes
from quantlib.checkpoint.reader import tensor_of
from quantlib.job.plan import TensorSpec

KINDS = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPart:
    """A part, as `quantlib.checkpoint.writer.ShardForm` wants it.

    Attributes:
        number: Of the part, from 0.
        count: Of parts.
        num_tensors: Of all parts.
        architecture: Of the model.
        names: Tensor of the plan -> its place in the file.
        kinds: Type of blocks of the tensors that hold any.
        describe: Adds the key-values of the model; for the first part only.
        constants: Tensors that are no part of the plan, by their name in the file, fp32.
    """

    number: int
    count: int
    num_tensors: int
    architecture: str
    names: Mapping[str, StoredName]
    kinds: Mapping[str, GGMLQuantizationType]
    describe: Callable[[GGUFWriter], None] | None = None
    constants: Mapping[str, np.ndarray]

    def layout(self, specs: Sequence[TensorSpec]) -> ShardLayout:
        """Header, constants and where each tensor lies."""
        with tempfile.TemporaryDirectory(prefix="quantmill-gguf-") as folder:
            path = Path(folder) / "part.gguf"
            writer = GGUFWriter(path, self.architecture)
            if self.describe is not None:
                self.describe(writer)
            writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, self.number)
            writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, self.count)
            writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, self.num_tensors)
            for name, values in self.constants.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for spec in specs:
                # Of blocks the package takes the shape in bytes, of floats in values.
                dtype = np.dtype(np.uint8 if spec.name in self.kinds else np.float32)
                name, size_bytes = self.names[spec.name].name, spec_bytes(_held(spec))
                writer.add_tensor_info(name, spec.shape, dtype, size_bytes, raw_dtype=self._kind(spec))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = _padded(path.read_bytes())
        header += b"".join(_padded(values.tobytes()) for values in self.constants.values())
        offsets, position = {}, len(header)
        for spec in specs:
            end = position + spec_bytes(_held(spec))
            offsets[spec.name] = (position, end)
            position = _aligned(end)
        return ShardLayout(header=header, offsets=offsets, size_bytes=position)

    def stored(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the plan with dtype and rows as the file has them."""
        return self.names[spec.name].stored(tensor).to(torch_dtype(_held(spec).dtype))

    def restored(self, spec: TensorSpec, view: memoryview) -> torch.Tensor:
        """The inverse, from bytes of the file; exact, as fp32 holds what a vector was made from."""
        held = _held(spec)
        entry = TensorEntry(
            name=held.name, dtype=held.dtype, shape=held.shape, shard="", start=0, end=len(view)
        )
        return self.names[spec.name].restored(tensor_of(view, entry)).to(torch_dtype(spec.dtype))

    def _kind(self, spec: TensorSpec) -> GGMLQuantizationType:
        return self.kinds.get(spec.name) or KINDS[_held(spec).dtype]


def _held(spec: TensorSpec) -> TensorSpec:
    """A tensor as the file holds it: vectors in fp32, as llama.cpp computes with them."""
    return dataclasses.replace(spec, dtype="F32") if len(spec.shape) == 1 else spec


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (_aligned(len(content)) - len(content))


def _aligned(position: int) -> int:
    return -(-position // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
