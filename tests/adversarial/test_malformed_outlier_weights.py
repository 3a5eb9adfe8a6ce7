"""Single weights kept beside codes that are incomplete, contradictory or hostile: one clear error each."""

import pytest
import torch

from quantlib.errors import PackingError
from quantlib.packing import compressed_tensors_format
from quantlib.packing.outliers import num_outlier_weights, unpack_linear
from quantlib.schemes import WeightScheme

NAME = "model.layers.0.mlp.up_proj"
SCHEME = WeightScheme(bits=4, is_symmetric=True, group_size=32)
INDEX, WEIGHT, COLUMNS = (f"{NAME}.{part}" for part in ("outlier_index", "outlier_weight", "outlier_columns"))


def index(*of_each_row, last=None, dtype=torch.uint16):
    rows = [list(of_each_row)] * 15 + [list(of_each_row if last is None else last)]
    return torch.tensor(rows, dtype=dtype)


def weights(*shape, dtype=torch.bfloat16, last=1.0):
    made = torch.ones(shape, dtype=dtype)
    made.view(-1)[-1] = last
    return made


def sound():
    return {
        f"{NAME}.weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        f"{NAME}.weight_scale": torch.ones(16, 2, dtype=torch.bfloat16),
        f"{NAME}.weight_shape": torch.tensor([16, 64]),
        INDEX: index(0, 5, 63),
        WEIGHT: weights(16, 3),
    }


def read(tensors):
    return unpack_linear(compressed_tensors_format, NAME, tensors, SCHEME)


def test_sound_tensors_are_read():
    level_RC = read(sound()).dequantize()
    assert [c for c in range(64) if bool((level_RC[:, c] == 1).all())] == [0, 5, 63]


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (INDEX, index(0, 5, 63, last=(0, 5, 64)), "must rise in every row, from 0 to at most 63"),
        (INDEX, index(0, 5, 63, last=(0, 5, 65535)), "must rise in every row, from 0 to at most 63"),
        (INDEX, index(0, 5, 63, last=(0, 63, 5)), "must rise in every row, from 0 to at most 63"),
        (INDEX, index(0, 5, 63, last=(0, 5, 5)), "must rise in every row, from 0 to at most 63"),
        (INDEX, index(0, 5), r"outlier_weight must be \(16, 2\), got \(16, 3\)"),
        (INDEX, index(0, 5, 63)[1:], r"outlier_index must be \(16, 3\), got \(15, 3\)"),
        (INDEX, index(0, 5, 63)[0], r"outlier_index must have two dims, got \(3,\)"),
        (INDEX, index(0, 5, 63)[None], r"outlier_index must have two dims, got \(1, 16, 3\)"),
        (INDEX, torch.tensor(0, dtype=torch.uint16), r"outlier_index must have two dims, got \(\)"),
        (INDEX, index(0, 5, 63, dtype=torch.int32), "are named in uint16, found torch.int32"),
        (INDEX, index(0, 5, 63, dtype=torch.float32), "are named in uint16, found torch.float32"),
        (WEIGHT, weights(16, 3, last=float("nan")), "outlier_weight must be finite, found NaN or infinity"),
        (WEIGHT, weights(16, 3, last=float("-inf")), "outlier_weight must be finite, found NaN or infinity"),
        (WEIGHT, torch.tensor(1.0), r"outlier_weight must be \(16, 3\), got \(\)"),
        (WEIGHT, weights(15, 3), r"outlier_weight must be \(16, 3\), got \(15, 3\)"),
        (WEIGHT, weights(3, 16), r"outlier_weight must be \(16, 3\), got \(3, 16\)"),
        (WEIGHT, weights(16, 3, dtype=torch.int8), "stored in bf16, fp16 or fp32, found torch.int8"),
        (WEIGHT, weights(16, 3, dtype=torch.float64), "stored in bf16, fp16 or fp32, found torch.float64"),
        (COLUMNS, torch.tensor([0, 5, 63], dtype=torch.int32), "has both outlier_columns and outlier_index"),
        (WEIGHT, None, f"tensor {WEIGHT} is missing"),
        (INDEX, None, f"tensor {COLUMNS} is missing"),
    ],
)
def test_tensor_of_another_kind_is_named(name, tensor, said):
    tensors = sound()
    tensors.pop(name, None)
    with pytest.raises(PackingError, match=said):
        read(tensors if tensor is None else tensors | {name: tensor})


@pytest.mark.parametrize(
    "entry",
    [
        {"weights_per_mille": 5},
        {"weights_per_mille": "5", "except": []},
        {"weights_per_mille": 0, "except": []},
        {"weights_per_mille": 0.5, "except": []},
        {"weights_per_mille": -5, "except": []},
        {"weights_per_mille": 5, "columns": 8, "except": []},
        {"weights_per_mille": 5, "except": None},
    ],
)
def test_config_that_does_not_say_how_many_is_refused(entry):
    with pytest.raises(PackingError, match="must hold a number of columns or weights_per_mille and a list"):
        num_outlier_weights({"outliers": entry}, NAME, 64)
