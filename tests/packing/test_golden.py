"""All packers against bytes that were put together by hand; tests/golden/README.md tells how."""

import json
from pathlib import Path

import pytest
import torch

from quantlib.packing import FORMATS
from quantlib.quantized import NestedScales, QuantizedLinear
from quantlib.schemes import WeightScheme
from tests.support.format_limits import FORMATS_AND_BITS, symmetries

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.json"))


def golden_linear(golden: dict) -> QuantizedLinear:
    zeros = golden["zeros"]
    return QuantizedLinear(
        codes_RC=torch.tensor(golden["codes"], dtype=torch.uint8),
        scale_RG=torch.tensor(golden["scales"], dtype=getattr(torch, golden["scale_dtype"])),
        zero_RG=None if zeros is None else torch.tensor(zeros, dtype=torch.uint8),
        scheme=WeightScheme(**golden["scheme"]),
        model_dtype=getattr(torch, golden["model_dtype"]) if "model_dtype" in golden else None,
        nested=golden_nested(golden["nested"]) if golden.get("nested") else None,
    )


def golden_nested(values: dict) -> NestedScales:
    return NestedScales(
        code_RG=torch.tensor(values["codes"], dtype=torch.uint8),
        absmax_N=torch.tensor(values["absmax"]),
        offset=torch.tensor(values["offset"]),
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_pack_golden_linear_gives_golden_bytes(path):
    golden = json.loads(path.read_text())
    packed = FORMATS[golden["format"]].pack("m", golden_linear(golden))
    assert list(packed) == [f"m.{name}" for name in golden["tensors"]]
    for name, expected in golden["tensors"].items():
        tensor = packed[f"m.{name}"]
        assert str(tensor.dtype) == f"torch.{expected['dtype']}", name
        assert list(tensor.shape) == expected["shape"], name
        assert bytes_of(tensor).hex() == expected["bytes"], name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_unpack_golden_bytes_gives_golden_linear(path):
    golden = json.loads(path.read_text())
    tensors = {
        f"m.{name}": torch.frombuffer(
            bytearray.fromhex(stored["bytes"]), dtype=getattr(torch, stored["dtype"])
        ).reshape(stored["shape"])
        for name, stored in golden["tensors"].items()
    }
    expected = golden_linear(golden)
    found = FORMATS[golden["format"]].unpack("m", tensors, expected.scheme)
    assert torch.equal(found.codes_RC, expected.codes_RC)
    assert torch.equal(found.scale_RG, expected.scale_RG)
    assert found.scale_RG.dtype == expected.scale_RG.dtype
    if expected.zero_RG is None:
        assert found.zero_RG is None
    else:
        assert torch.equal(found.zero_RG, expected.zero_RG)
    assert found.model_dtype == expected.model_dtype


def test_golden_folder_covers_all_formats_symmetries_and_widths():
    found = [json.loads(path.read_text()) for path in GOLDEN]
    found = [golden for golden in found if "number" not in golden["scheme"]]
    found_symmetries = {(golden["format"], golden["scheme"]["is_symmetric"]) for golden in found}
    assert found_symmetries == {(name, symmetric) for name in FORMATS for symmetric in symmetries(name)}
    widths = {(golden["format"], golden["scheme"]["bits"]) for golden in found}
    assert widths == {(name, bits) for name, bits in FORMATS_AND_BITS if bits != 2}
