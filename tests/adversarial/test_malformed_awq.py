"""AWQ linears and config blocks that are incomplete, contradictory or hostile: one clear error each."""

import pytest
import torch

from quantlib.errors import PackingError
from quantlib.packing import awq_format
from quantlib.schemes import WHOLE_ROW, WeightScheme

NAME = "model.layers.0.mlp.up_proj"
SCHEME = WeightScheme(bits=4, is_symmetric=False, group_size=32)
BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def sound():
    return {
        f"{NAME}.qweight": torch.zeros(64, 2, dtype=torch.int32),
        f"{NAME}.qzeros": torch.zeros(2, 2, dtype=torch.int32),
        f"{NAME}.scales": torch.ones(2, 16, dtype=torch.float16),
    }


def test_sound_tensors_are_read():
    assert awq_format.unpack(NAME, sound(), SCHEME).codes_RC.shape == (16, 64)


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("qweight", torch.zeros((), dtype=torch.int32), r"qweight must be a matrix of words, got \(\)"),
        ("qweight", torch.zeros(64, dtype=torch.int32), "must be a matrix"),
        ("qweight", torch.zeros(64, 2, 1, dtype=torch.int32), "must be a matrix"),
        ("qweight", torch.zeros(0, 2, dtype=torch.int32), r"matrix of words, got \(0, 2\)"),
        ("qweight", torch.zeros(64, 0, dtype=torch.int32), r"matrix of words, got \(64, 0\)"),
        ("qweight", torch.zeros(64, 2, dtype=torch.int64), "must be torch.int32, got torch.int64"),
        ("qweight", torch.zeros(64, 2), "must be torch.int32, got torch.float32"),
        ("qweight", torch.zeros(65, 2, dtype=torch.int32), "divides its 65 columns, got 32"),
        ("qweight", torch.zeros(96, 2, dtype=torch.int32), r"qzeros must be \(3, 2\), got \(2, 2\)"),
        ("qweight", torch.zeros(64, 3, dtype=torch.int32), r"qzeros must be \(2, 3\)"),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int16), "qzeros must be torch.int32"),
        ("qzeros", torch.zeros(2, 2, 1, dtype=torch.int32), r"qzeros must be \(2, 2\)"),
        ("scales", torch.ones(16, 2, dtype=torch.float16), r"scales must be \(2, 16\), got \(16, 2\)"),
        ("scales", torch.ones(2, dtype=torch.float16), r"scales must be \(2, 16\)"),
    ],
)
def test_tensor_of_another_kind_is_named(part, tensor, said):
    with pytest.raises(PackingError, match=said):
        awq_format.unpack(NAME, sound() | {f"{NAME}.{part}": tensor}, SCHEME)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_tensor_is_named(part):
    tensors = sound()
    del tensors[f"{NAME}.{part}"]
    with pytest.raises(PackingError, match=f"{NAME}.{part} is missing"):
        awq_format.unpack(NAME, tensors, SCHEME)


@pytest.mark.parametrize("size", [-2, 48])
def test_scheme_that_no_tensors_have_is_refused(size):
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=size)
    with pytest.raises(PackingError, match=f"got {size}; use"):
        awq_format.unpack(NAME, sound(), scheme)


def test_words_of_another_group_size_are_refused():
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=WHOLE_ROW)
    with pytest.raises(PackingError, match=r"qzeros must be \(1, 2\), got \(2, 2\)"):
        awq_format.unpack(NAME, sound(), scheme)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 8}, "of 4 bits are read; got bits 8"),
        ({"bits": None}, "got bits None"),
        ({"bits": "4"}, "got bits '4'"),
        ({"group_size": None}, "group_size None"),
        ({"group_size": "32"}, "group_size '32'"),
        ({"zero_point": "yes"}, "zero_point 'yes'"),
        ({"version": "gemv"}, "version gemm are read, got 'gemv'"),
        ({"version": "GEMV_FAST"}, "got 'GEMV_FAST'"),
        ({"version": 1}, "got 1"),
        ({"version": None, "format": "marlin"}, "format gemm are read, got 'marlin'"),
        ({"checkpoint_format": "gptq"}, "checkpoint_format gemm are read"),
        ({"backend": "llm-awq"}, "llm-awq"),
        # A name on its own would be taken for a list of letters, and keep everything.
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names, got 'lm_head'"),
        ({"modules_to_not_convert": [None]}, "must be a list of names"),
        ({"modules_to_not_convert": {"lm_head": True}}, "must be a list of names"),
    ],
)
def test_config_that_says_something_else_is_refused(given, said):
    with pytest.raises(PackingError, match=said):
        awq_format.scheme_of({**BLOCK, **given}, NAME)


@pytest.mark.parametrize("missing", ["bits", "group_size"])
def test_config_that_says_too_little_is_refused(missing):
    block = {key: value for key, value in BLOCK.items() if key != missing}
    with pytest.raises(PackingError, match=f"{missing} None"):
        awq_format.scheme_of(block, NAME)
