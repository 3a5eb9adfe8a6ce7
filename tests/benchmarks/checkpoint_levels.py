"""What a quantized checkpoint means: the levels of all its tensors, by a decoder of its own.

It shares no code with the product's packers: bits are unfolded one by one and summed up by the definitions
of the two layouts. Whatever tool wrote a file, it is read alike, and the levels are put into a fresh
transformers model, so that nothing of the source's weights is in it.

Left out: checkpoints with linears of different bits, and bit planes (``gptq_p``).

R rows (out features), C columns (in features), G groups along C, P words along C, L lines, N codes of a line.

Source: compressed-tensors, src/compressed_tensors/compressors (pack-quantized); GPTQModel 7.7,
gptqmodel/nn_modules/qlinear/__init__.py (gptq, gptq_v2).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantlib.errors import CheckpointError

# What readers add to a stored zero point.
_ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_of_levels(source: Path, checkpoint: Path) -> PreTrainedModel:
    """A plain fp32 model of the source's architecture that holds the levels of a checkpoint and nothing else.

    Raises:
        CheckpointError: A tensor of the model is missing, or one is there that the model has no place for.
    """
    levels = read_levels(checkpoint)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    if model.config.tie_word_embeddings:
        levels.setdefault(_HEAD, levels[_EMBEDDING])
        if not torch.equal(levels[_HEAD], levels[_EMBEDDING]):
            raise CheckpointError(f"{checkpoint}: the head differs from the embedding it is tied to")
    places = model.state_dict()
    if set(places) != set(levels):
        missing, foreign = sorted(set(places) - set(levels)), sorted(set(levels) - set(places))
        raise CheckpointError(
            f"{checkpoint}: wanted the tensors of {source}; missing {missing[:3]}, foreign {foreign[:3]}"
        )
    model.load_state_dict(levels)
    return model.eval()


def read_levels(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in fp32, quantized linears as the levels of their codes.

    Raises:
        CheckpointError: No shard, a layout that is not known here, or words that do not fit their shape.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    if not tensors:
        raise CheckpointError(f"{folder}: wanted safetensors files, found none")
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if settings is None:
        return {name: tensor.float() for name, tensor in tensors.items()}
    if settings["quant_method"] == "compressed-tensors":
        return _read_pack_quantized(tensors, settings)
    if settings["quant_method"] == "gptq" and settings["checkpoint_format"] in _ZERO_SHIFTS:
        return _read_gptq(tensors, settings)
    raise CheckpointError(f"{folder}: its layout is not known here: {settings}")


def _read_pack_quantized(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Codes and zero points are stored with 2**(b-1) added; without zero points that is the zero."""
    (bits,) = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    levels, names = _split(tensors, "weight_packed")
    for name in names:
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        codes_RC = _fields(tensors[f"{name}.weight_packed"], bits, columns)
        scale_RG = tensors[f"{name}.weight_scale"]
        zero_RG = torch.full(scale_RG.shape, 2 ** (bits - 1))
        if f"{name}.weight_zero_point" in tensors:
            zero_RG = _fields(tensors[f"{name}.weight_zero_point"].T, bits, rows).T
        groups_C = tensors.get(f"{name}.weight_g_idx", _consecutive(columns, scale_RG.shape[1]))
        levels[f"{name}.weight"] = _levels(codes_RC, scale_RG, zero_RG, groups_C)
    return levels


def _read_gptq(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    bits, shift = settings["bits"], _ZERO_SHIFTS[settings["checkpoint_format"]]
    levels, names = _split(tensors, "qweight")
    for name in names:
        groups_C, scale_GR = tensors[f"{name}.g_idx"], tensors[f"{name}.scales"]
        codes_RC = _fields(tensors[f"{name}.qweight"].T, bits, len(groups_C))
        zero_GR = _fields(tensors[f"{name}.qzeros"], bits, scale_GR.shape[1]) + shift
        levels[f"{name}.weight"] = _levels(codes_RC, scale_GR.T, zero_GR.T, groups_C)
    return levels


def _split(tensors: Mapping[str, torch.Tensor], packed: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of no quantized linear in fp32, and the names of those linears."""
    names = [name.removesuffix(f".{packed}") for name in tensors if name.endswith(f".{packed}")]
    inside = set(names)
    others = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] not in inside or name.endswith(".bias")
    }
    return others, names


def _fields(words_LP: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unsigned fields of each line: field i is the bits from ``bits * i`` on, the lowest first.

    Shapes:
        words_LP: int32 [L, P]; returns int64 [L, N] with N = ``count``.

    Raises:
        CheckpointError: P is not what the fields take.
    """
    wanted = (count * bits + 31) // 32
    if words_LP.dtype != torch.int32 or words_LP.shape[1] != wanted:
        raise CheckpointError(
            f"{count} fields of {bits} bits take {wanted} int32 words a line,"
            f" found {words_LP.shape[1]} of {words_LP.dtype}"
        )
    bytes_of_lines = words_LP.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    bits_of_lines = np.unpackbits(bytes_of_lines, axis=1, count=count * bits, bitorder="little")
    fields_LNb = bits_of_lines.reshape(len(words_LP), count, bits)
    return torch.from_numpy(sum(fields_LNb[:, :, b].astype(np.int64) << b for b in range(bits)))


def _consecutive(columns: int, groups: int) -> torch.Tensor:
    return torch.arange(columns) // (columns // groups)


def _levels(
    codes_RC: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor, groups_C: torch.Tensor
) -> torch.Tensor:
    """scale * (code - zero) in fp32, each column with those of its group."""
    groups_C = groups_C.long()
    return scale_RG.float()[:, groups_C] * (codes_RC - zero_RG[:, groups_C]).float()
