"""Blocks of 4 bits against bitsandbytes itself, which loads ours and whose own are read."""

import dataclasses
import json

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from quantlib.errors import PackingError
from quantlib.grids.nested_scales import nest, scales_of
from quantlib.packing import bitsandbytes_format
from quantlib.packing.specs import packed_on_meta
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import scheme_from_name

NAME = "model.layers.3.mlp.up_proj"
SCHEMES = {name: scheme_from_name(name) for name in ("NF4", "NF4_DQ", "FP4", "FP4_DQ")}


def random_blocks(rows, blocks, name, *, model_dtype=torch.float32, seed=0):
    """A linear of any codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    scale_RG = torch.rand(rows, blocks, generator=generator) + 0.01
    nested = nest(scale_RG)[0] if name.endswith("_DQ") else None
    return QuantizedLinear(
        codes_RC=torch.randint(0, 16, (rows, 64 * blocks), generator=generator).to(torch.uint8),
        scale_RG=scale_RG if nested is None else scales_of(nested),
        zero_RG=None,
        scheme=SCHEMES[name],
        model_dtype=model_dtype,
        nested=nested,
    )


def read_by_bitsandbytes(packed):
    parts = {name.removeprefix(f"{NAME}.weight."): part for name, part in packed.items()}
    codes = parts.pop(f"{NAME}.weight")
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("name", SCHEMES)
# The last has scales for more than one factor, the second a row of several blocks.
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (130, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_makes_our_levels_of_our_tensors(name, rows, blocks, dtype):
    quantized = random_blocks(rows, blocks, name, model_dtype=dtype)
    found = read_by_bitsandbytes(bitsandbytes_format.pack(NAME, quantized))
    assert found.dtype == dtype
    assert torch.equal(found, quantized.dequantize().to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tensors_that_bitsandbytes_made_come_back_byte_for_byte(kind):
    weight_RC = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, state = bnb.quantize_4bit(weight_RC, quant_type=kind, compress_statistics=False)
    theirs = {f"{NAME}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    theirs[f"{NAME}.weight"] = codes
    read = bitsandbytes_format.unpack(NAME, theirs, SCHEMES[kind.upper()])
    assert torch.equal(read.dequantize().bfloat16(), bnb.dequantize_4bit(codes, state))
    ours = bitsandbytes_format.pack(NAME, read)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 6),
    name=st.sampled_from(sorted(SCHEMES)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.floats(2.0**-30, 2.0**30),
    seed=st.integers(0, 99),
)
def test_unpack_gives_what_was_packed_and_meta_tensors_promise_it(rows, blocks, name, dtype, size, seed):
    quantized = random_blocks(rows, blocks, name, model_dtype=dtype, seed=seed)
    if quantized.nested is None:
        quantized = dataclasses.replace(quantized, scale_RG=quantized.scale_RG * size)
    else:
        nested = nest(quantized.scale_RG * size)[0]
        quantized = dataclasses.replace(quantized, nested=nested, scale_RG=scales_of(nested))
    packed = bitsandbytes_format.pack(NAME, quantized)
    found = bitsandbytes_format.unpack(NAME, packed, quantized.scheme)
    assert torch.equal(found.codes_RC, quantized.codes_RC)
    assert torch.equal(found.scale_RG, quantized.scale_RG)
    assert found.model_dtype == dtype
    if quantized.nested is not None:
        for part in ("code_RG", "absmax_N", "offset"):
            assert torch.equal(getattr(found.nested, part), getattr(quantized.nested, part)), part
    promised = packed_on_meta(
        bitsandbytes_format, NAME, rows=rows, columns=64 * blocks, scheme=SCHEMES[name], model_dtype=dtype
    )
    kinds = {n: (t.dtype, t.shape) for n, t in packed.items()}
    assert kinds == {n: (t.dtype, t.shape) for n, t in promised.items()}
    assert set(packed) <= set(bitsandbytes_format.packed_names(NAME))
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_config_block_is_what_transformers_writes_and_is_read_back(name):
    block = bitsandbytes_format.quantization_config({NAME: SCHEMES[name]}, ["lm_head"])
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_type=name[:3].lower(),
        bnb_4bit_use_double_quant=name.endswith("_DQ"),
    ).to_dict()
    assert block == wanted
    assert bitsandbytes_format.scheme_of(block, NAME) == SCHEMES[name]
    assert bitsandbytes_format.scheme_of(block, "lm_head") is None


@pytest.mark.parametrize("columns", [32, 96, 65])
def test_rows_that_are_no_whole_blocks_are_refused_with_what_fits(columns):
    with pytest.raises(PackingError, match=f"multiples of 64, got {columns}; .* W8A16 with group_size -1"):
        bitsandbytes_format.check(NAME, 64, columns, SCHEMES["NF4"])


CONTRADICTIONS = {
    "a code is 16": lambda q: dataclasses.replace(q, codes_RC=torch.full_like(q.codes_RC, 16)),
    "must be quantized by its scheme": lambda q: dataclasses.replace(q, nested=None),
    "must not be quantized by its scheme": lambda q: dataclasses.replace(q, scheme=SCHEMES["NF4"]),
    "not those that their codes mean": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG * 2),
    "states the dtype of the weight": lambda q: dataclasses.replace(q, model_dtype=None),
    "got torch.float64": lambda q: dataclasses.replace(q, model_dtype=torch.float64),
    "scales must be torch.float32": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG.bfloat16()),
    "nested scales must be": lambda q: dataclasses.replace(
        q, nested=dataclasses.replace(q.nested, absmax_N=torch.ones(7))
    ),
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_linear_that_contradicts_itself_is_refused(said):
    with pytest.raises(PackingError, match=said):
        bitsandbytes_format.pack(NAME, CONTRADICTIONS[said](random_blocks(8, 2, "NF4_DQ")))


def content(values):
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


SOUND = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [8, 128],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 1.0,
}


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("quant_state.bitsandbytes__nf4", content(b"{"), "must hold JSON"),
        ("quant_state.bitsandbytes__nf4", content(b"\xff"), "must hold JSON"),
        ("quant_state.bitsandbytes__nf4", content(b"[" * 100_000), "must hold JSON"),
        ("quant_state.bitsandbytes__nf4", content([]), "must hold a JSON object"),
        *(
            ("quant_state.bitsandbytes__nf4", content({**SOUND, **change}), "and sizes, got")
            for change in (
                {"blocksize": 128},
                {"quant_type": "fp4"},
                {"nested_blocksize": 64},
                {"nested_offset": None},
                {"nested_offset": float("nan")},
                {"shape": [8]},
                {"shape": [8, -128]},
                {"shape": [True, 128]},
                {"dtype": "float64"},
                {"dtype": []},
            )
        ),
        ("quant_state.bitsandbytes__nf4", content({**SOUND, "shape": [8, 96]}), "multiples of 64, got 96"),
        ("quant_state.bitsandbytes__nf4", content({**SOUND, "shape": [1 << 60, 128]}), "weight must be"),
        ("quant_map", torch.zeros(16), "another table"),
        ("nested_quant_map", bnb.create_dynamic_map(), "another table"),
        ("absmax", torch.ones(16), "must be torch.uint8"),
        ("absmax", torch.ones(15, dtype=torch.uint8), r"must be \(16,\)"),
        ("nested_absmax", torch.ones(2), r"must be \(1,\)"),
    ],
)
def test_tensors_that_are_not_as_they_are_written_are_refused(part, tensor, said):
    packed = bitsandbytes_format.pack(NAME, random_blocks(8, 2, "NF4_DQ"))
    packed[f"{NAME}.weight.{part}"] = tensor
    with pytest.raises(PackingError, match=said):
        bitsandbytes_format.unpack(NAME, packed, SCHEMES["NF4_DQ"])


def test_every_missing_tensor_is_named():
    packed = bitsandbytes_format.pack(NAME, random_blocks(8, 2, "FP4_DQ"))
    assert len(packed) == 6
    for name in packed:
        others = {n: t for n, t in packed.items() if n != name}
        with pytest.raises(PackingError, match=f"{name} is missing"):
            bitsandbytes_format.unpack(NAME, others, SCHEMES["FP4_DQ"])
