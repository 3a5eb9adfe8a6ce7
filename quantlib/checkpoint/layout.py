"""What an output shard's bytes will be, before there is any tensor.

Names, dtypes and shapes of everything to be written are known from the plan, so header, offsets, file names
and index follow; nothing is renamed or merged afterwards. Tensors stand in the order of their specs.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantlib.checkpoint.header import DTYPE_BYTES, LENGTH_BYTES, MAX_HEADER_BYTES
from quantlib.errors import PackingError
from quantlib.job.plan import TensorSpec, UnitPlan

# transformers refuses a shard that does not say which framework wrote it.
METADATA = {"format": "pt"}
# Data begins at a multiple of this, so that readers which map the file get aligned tensors.
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """Every byte of a shard but the tensors' own.

    Attributes:
        header: The first bytes of the file: length prefix and JSON, padded with spaces.
        offsets: Tensor name -> [start, end), counted from the beginning of the file.
        size_bytes: Size of the whole file.
    """

    header: bytes
    offsets: dict[str, tuple[int, int]]
    size_bytes: int


def layout_shard(specs: Sequence[TensorSpec]) -> ShardLayout:
    """Lay tensors out one after the other, in the order given.

    Raises:
        PackingError: A name twice, a dtype the format does not have, a negative dim, or too long a header.
    """
    entries: dict[str, object] = {"__metadata__": METADATA}
    relative: dict[str, tuple[int, int]] = {}
    position = 0
    for spec in specs:
        end = position + spec_bytes(spec)
        if spec.name in entries:
            raise PackingError(f"tensor {spec.name!r} would be in one shard twice", tensor=spec.name)
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        relative[spec.name] = (position, end)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise PackingError(
            f"the header of {len(specs)} tensors takes {len(text)} bytes, at most {MAX_HEADER_BYTES} are"
            " allowed; write smaller shards"
        )
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    offsets = {name: (len(header) + start, len(header) + end) for name, (start, end) in relative.items()}
    return ShardLayout(header=header, offsets=offsets, size_bytes=len(header) + position)


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's data.

    Raises:
        PackingError: The dtype or the shape is none that safetensors knows.
    """
    if spec.dtype not in DTYPE_BYTES:
        raise PackingError(
            f"tensor {spec.name!r} has the dtype {spec.dtype!r}, safetensors knows {', '.join(DTYPE_BYTES)}",
            tensor=spec.name,
        )
    if any(dim < 0 for dim in spec.shape):
        raise PackingError(f"tensor {spec.name!r} has the shape {spec.shape}", tensor=spec.name)
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]


def shard_names(count: int, ending: str = ".safetensors") -> tuple[str, ...]:
    """The final file names of ``count`` shards.

    >>> shard_names(2)
    ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')
    """
    return tuple(f"model-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1))


def index_bytes(units: Iterable[UnitPlan]) -> bytes:
    """``model.safetensors.index.json`` of an output.

    Raises:
        PackingError: Two units hold the same tensor.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for unit in units:
        for spec in unit.tensors:
            if spec.name in weight_map:
                raise PackingError(
                    f"tensor {spec.name!r} would be in {weight_map[spec.name]} and in {unit.shard}",
                    tensor=spec.name,
                )
            weight_map[spec.name] = unit.shard
            total_bytes += spec_bytes(spec)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
