"""Columns kept beside the codes that are incomplete, contradictory or hostile: one clear error each."""

import pytest
import torch

from quantlib.errors import PackingError
from quantlib.packing import compressed_tensors_format
from quantlib.packing.outliers import num_outlier_columns, unpack_linear
from quantlib.schemes import WeightScheme

NAME = "model.layers.0.mlp.up_proj"
SCHEME = WeightScheme(bits=4, is_symmetric=True, group_size=32)
COLUMNS, WEIGHT = f"{NAME}.outlier_columns", f"{NAME}.outlier_weight"


def sound():
    return {
        f"{NAME}.weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        f"{NAME}.weight_scale": torch.ones(16, 2, dtype=torch.bfloat16),
        f"{NAME}.weight_shape": torch.tensor([16, 64]),
        COLUMNS: torch.tensor([0, 5, 63], dtype=torch.int32),
        WEIGHT: torch.ones(16, 3, dtype=torch.bfloat16),
    }


def read(tensors):
    return unpack_linear(compressed_tensors_format, NAME, tensors, SCHEME)


def test_sound_tensors_are_read():
    level_RC = read(sound()).dequantize()
    assert [c for c in range(64) if bool((level_RC[:, c] == 1).all())] == [0, 5, 63]


def named(*columns):
    return torch.tensor(columns, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (COLUMNS, named(0, 5, 64), "must rise from 0 to at most 63"),
        (COLUMNS, named(-1, 5, 63), "must rise from 0 to at most 63"),
        (COLUMNS, named(0, 63, 5), "must rise from 0 to at most 63"),
        (COLUMNS, named(0, 5, 5), "must rise from 0 to at most 63"),
        (COLUMNS, named(0, 5), r"outlier_weight must be \(16, 2\), got \(16, 3\)"),
        (COLUMNS, torch.tensor(0, dtype=torch.int32), r"outlier_columns must be \(1,\), got \(\)"),
        (COLUMNS, named(0, 5, 63)[None], r"outlier_columns must be \(3,\), got \(1, 3\)"),
        (COLUMNS, named(0, 5, 63).long(), "are named in int32"),
        (COLUMNS, named(0, 5, 63).float(), "are named in int32"),
        (WEIGHT, torch.tensor(1.0), r"outlier_weight must be \(16, 3\), got \(\)"),
        (WEIGHT, torch.ones(15, 3), r"outlier_weight must be \(16, 3\), got \(15, 3\)"),
        (WEIGHT, torch.ones(3, 16), r"outlier_weight must be \(16, 3\), got \(3, 16\)"),
        (WEIGHT, torch.ones(16, 3, dtype=torch.int8), "stored in bf16, fp16 or fp32"),
        (COLUMNS, None, f"tensor {COLUMNS} is missing"),
        (WEIGHT, None, f"tensor {WEIGHT} is missing"),
    ],
)
def test_tensor_of_another_kind_is_named(name, tensor, said):
    tensors = sound()
    del tensors[name]
    with pytest.raises(PackingError, match=said):
        read(tensors if tensor is None else tensors | {name: tensor})


@pytest.mark.parametrize(
    "entry",
    [8, [], "8", {}, {"columns": 8}, {"columns": "8", "except": []}, {"columns": 0, "except": []}]
    + [{"columns": 8, "except": None}, {"columns": 8, "except": {}}],
)
def test_config_that_does_not_say_how_many_is_refused(entry):
    with pytest.raises(PackingError, match="must hold a number of columns or weights_per_mille and a list"):
        num_outlier_columns({"outliers": entry}, NAME)
