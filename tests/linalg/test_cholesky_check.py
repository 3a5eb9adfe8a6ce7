"""The check of a device's factors: right ways pass, and wrong ones are found out."""

import numpy as np
import pytest
import torch

from quantlib.cholesky import CHOLESKYS, blocked_cholesky_, library_cholesky_
from quantlib.cholesky_check import check_choleskys, checked_choleskys
from quantlib.errors import DeviceError

CPU = torch.device("cpu")


def one_entry_wrong(matrix_CC):
    status = library_cholesky_(matrix_CC)
    matrix_CC[211, 17] *= 1.05
    return status


def pivot_wrong(matrix_CC):
    status = library_cholesky_(matrix_CC)
    matrix_CC[299, 299] *= -1.0
    return status


def entry_left_above_the_diagonal(matrix_CC):
    status = library_cholesky_(matrix_CC)
    matrix_CC[5, 6] = 1e-6
    return status


def rows_mixed_up(matrix_CC):
    status = library_cholesky_(matrix_CC)
    matrix_CC[[250, 251], :200] = matrix_CC[[251, 250], :200]
    return status


def columns_mixed_up(matrix_CC):
    status = library_cholesky_(matrix_CC)
    matrix_CC[200:, [3, 90]] = matrix_CC[200:, [90, 3]]
    return status


def update_left_out(matrix_CC):
    """As if a product had not reached the last rows."""
    last_LL = matrix_CC[200:, 200:].clone()
    status = library_cholesky_(matrix_CC)
    library_cholesky_(last_LL.mT)
    matrix_CC[200:, 200:] = last_LL
    return status


def nothing_done(matrix_CC):
    return torch.zeros((), dtype=torch.int32)


def all_nan(matrix_CC):
    matrix_CC.fill_(float("nan"))
    return torch.zeros((), dtype=torch.int32)


def called_not_positive_definite(matrix_CC):
    library_cholesky_(matrix_CC)
    return torch.tensor(41, dtype=torch.int32)


def refused(matrix_CC):
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE\nat some place of the library")


def out_of_memory(matrix_CC):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.56 GiB.")


WRONG = {
    one_entry_wrong: "1 wrong entries",
    pivot_wrong: "1 wrong entries",
    entry_left_above_the_diagonal: "1 wrong entries",
    rows_mixed_up: "wrong entries",
    columns_mixed_up: "wrong entries",
    update_left_out: "wrong entries",
    nothing_done: "wrong entries",
    all_nan: "90000 wrong entries",
    called_not_positive_definite: "status 41",
    refused: "cusolver error: CUSOLVER_STATUS_INVALID_VALUE",
    out_of_memory: "CUDA out of memory. Tried to allocate 10.56 GiB.",
}


@pytest.mark.parametrize("way", CHOLESKYS)
@pytest.mark.parametrize("columns", [1, 2, 255, 256, 300, 1500])
def test_right_way_passes(way, columns):
    found = check_choleskys(columns, CPU, {way: CHOLESKYS[way]})
    assert (found.way, found.columns, found.problems) == (way, columns, {})


def test_float64_reference_passes():
    def reference(matrix_CC):
        matrix_CC.copy_(torch.from_numpy(np.linalg.cholesky(matrix_CC.double().numpy())))
        return torch.zeros((), dtype=torch.int32)

    assert check_choleskys(700, CPU, {"reference": reference}).way == "reference"


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_way_is_passed_over_and_told(wrong):
    found = check_choleskys(300, CPU, {"library": wrong, "blocked": blocked_cholesky_})
    assert found.way == "blocked"
    assert list(found.problems) == ["library"] and WRONG[wrong] in found.problems["library"]
    assert found.to_dict() == {"way": "blocked", "columns": 300, "problems": found.problems}


def test_no_right_way_is_one_clear_error():
    with pytest.raises(
        DeviceError, match="300 columns.*library: 1 wrong entries; blocked: status 41"
    ) as caught:
        check_choleskys(300, CPU, {"library": one_entry_wrong, "blocked": called_not_positive_definite})
    assert caught.value.facts == {"columns": 300, "device": "cpu"}


def test_process_checks_a_size_of_a_device_once():
    first = checked_choleskys(123, CPU)
    assert checked_choleskys(123, CPU) is first and first.way == "library"
    assert checked_choleskys(124, CPU) is not first
