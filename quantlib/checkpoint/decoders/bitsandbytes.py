"""bitsandbytes: 4-bit NF4 and FP4, their scales quantized once more or not, and LLM.int8.

Of ``<name>`` [R, C], 4 bits: ``<name>`` bytes of any dtype, values of the flattened matrix two a byte, the
higher nibble first; ``<name>.quant_map`` fp32 [16], the values of the codes; ``<name>.absmax``, the scale of
every ``blocksize`` values, fp32 or, quantized again, uint8 codes of ``<name>.nested_quant_map`` fp32 [256]
with ``<name>.nested_absmax`` for every ``nested_blocksize`` of them, to which ``nested_offset`` is added;
``<name>.quant_state.bitsandbytes__nf4`` JSON with these sizes, the shape and the offset.
8 bits: ``<name>`` int8 [R, C] and ``<linear>.SCB`` fp32 [R], the greatest magnitude of a row, coded as 127.

Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit, dequantize_blockwise).
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError

_STATE = ".quant_state.bitsandbytes__"
_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_INT8_SCALE, _INT8_LAYOUT = ".SCB", ".weight_format"
_INT8_RANGE = 127.0


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:  # noqa: ARG001 - one form
    """Every weight with a state or an SCB; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    states = {name.partition(_STATE)[0]: entry for name, entry in stored.items() if _STATE in name}
    texts = read(list(states.values())) if states else {}
    decoded = {
        name: _four_bit(name, stored, _state(name, texts[entry.name])) for name, entry in states.items()
    }
    for name, scale in stored.items():
        if name.endswith(_INT8_SCALE):
            linear = name.removesuffix(_INT8_SCALE)
            decoded[f"{linear}.weight"] = _eight_bit(linear, stored, scale)
    dropped = {entry.name: "its content says how codes are read" for entry in states.values()}
    dropped |= {name: "codes lie row by row" for name in stored if name.endswith(_INT8_LAYOUT)}
    return Found(decoded=decoded, dropped=dropped)


def _state(name: str, content: torch.Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(content.numpy()).decode())
        shape = tuple(int(size) for size in state["shape"])
        values = {"shape": shape, "blocksize": int(state["blocksize"])}
        if "nested_blocksize" in state:
            values["nested_blocksize"] = int(state["nested_blocksize"])
            values["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the quant_state of {name} cannot be understood ({error}); the checkpoint is damaged",
            tensor=name,
        ) from error
    if len(shape) != 2 or min(*shape, values["blocksize"], values.get("nested_blocksize", 1)) < 1:
        raise CheckpointError(f"the quant_state of {name} has sizes that cannot be: {values}", tensor=name)
    return values


def _four_bit(name: str, stored: Mapping[str, TensorEntry], state: Mapping[str, Any]) -> DecodedTensor:
    named = {"codes": name} | {role: f"{name}.{role}" for role in _ROLES}
    parts = {role: stored[tensor] for role, tensor in named.items() if tensor in stored}
    values = state["shape"][0] * state["shape"][1]
    wanted = {"codes", *(_ROLES if "nested_blocksize" in state else _ROLES[:2])}
    if wanted - set(parts) or parts["codes"].size_bytes != -(-values // 2):
        raise CheckpointError(
            f"{name} is {list(state['shape'])} by its quant_state; wanted {', '.join(sorted(wanted))} of that"
            f" size, found {', '.join(f'{role} {list(entry.shape)}' for role, entry in parts.items())}",
            tensor=name,
        )
    if parts["absmax"].num_values != -(-values // state["blocksize"]):
        raise CheckpointError(
            f"{name} has {parts['absmax'].num_values} scales, one for every {state['blocksize']} of {values}"
            " values is needed; the checkpoint is damaged",
            tensor=name,
        )
    return DecodedTensor(shape=state["shape"], parts=parts, make_rows=partial(_four_bit_rows, state))


def _four_bit_rows(
    state: Mapping[str, Any], parts: Mapping[str, torch.Tensor], start: int, end: int
) -> torch.Tensor:
    columns, size = state["shape"][1], state["blocksize"]
    first, last = start * columns, end * columns
    packed = parts["codes"].flatten().view(torch.uint8)[first // 2 : -(-last // 2)]
    codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten()[: last - first]
    blocks = torch.arange(first // size, -(-last // size))
    scales = _scales(state, parts, blocks).repeat_interleave(size)[first % size :][: last - first]
    return (parts["quant_map"].float()[codes.int()] * scales).reshape(end - start, columns)


def _scales(
    state: Mapping[str, Any], parts: Mapping[str, torch.Tensor], blocks: torch.Tensor
) -> torch.Tensor:
    absmax = parts["absmax"].flatten()[blocks]
    if "nested_blocksize" not in state:
        return absmax.float()
    coarse = parts["nested_absmax"].float()[blocks // state["nested_blocksize"]]
    return parts["nested_quant_map"].float()[absmax.int()] * coarse + state["nested_offset"]


def _eight_bit(linear: str, stored: Mapping[str, TensorEntry], scale: TensorEntry) -> DecodedTensor:
    codes = stored.get(f"{linear}.weight")
    if codes is None or codes.dtype != "I8" or codes.shape[:1] != scale.shape or len(codes.shape) != 2:
        raise CheckpointError(
            f"{scale.name} is {list(scale.shape)}; wanted an int8 {linear}.weight with as many rows,"
            f" found {'none' if codes is None else f'{codes.dtype} {list(codes.shape)}'}",
            linear=linear,
        )
    parts = {"codes": codes, "scale": scale}
    return DecodedTensor(shape=codes.shape, parts=parts, make_rows=_eight_bit_rows)


def _eight_bit_rows(parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    return parts["codes"][start:end].float() * (parts["scale"][start:end, None].float() / _INT8_RANGE)
