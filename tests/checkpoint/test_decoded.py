"""What decoding takes, from shapes, and how many rows are made at a time."""

import dataclasses

import pytest
import torch

from quantlib.checkpoint.decoded import DecodedTensor, decoding_bytes
from quantlib.checkpoint.header import TensorEntry
from quantlib.job.planner import build_plan
from tests.support.quantized_sources import opened, requantized
from tests.support.tiny_jobs import tiny_options
from tests.support.tiny_models import read_all_tensors

MIB = 1 << 20


def _made(shape: tuple[int, ...], stored: int, row_step: int | None = 128) -> DecodedTensor:
    def never(parts, start, end):
        raise AssertionError((parts, start, end))

    sizes = {"codes": stored - 5, "scale": 5}
    parts = {
        role: TensorEntry(name=role, dtype="U8", shape=(size,), shard="s", start=7, end=7 + size)
        for role, size in sizes.items()
    }
    return DecodedTensor(shape=shape, parts=parts, make_rows=never, row_step=row_step)


@pytest.mark.parametrize(
    ("shape", "row_step", "run_rows"),
    [
        ((8192, 4096), 128, 1024),
        ((8192, 4096), None, 8192),
        ((300, 1 << 20), 128, 128),
        ((300, 3000), 128, 1280),
        ((32, 2880, 5760), 1, 1),
        ((32, 1024, 1024), 1, 4),
        ((300, 0), 128, 128 * 4 * MIB),
    ],
)
def test_rows_made_at_a_time_are_four_million_values_or_one_step(shape, row_step, run_rows):
    assert _made(shape, 100, row_step).run_rows == run_rows


def test_nothing_is_decoded_for_nothing():
    assert decoding_bytes([]) == 0


def test_codes_of_one_tensor_are_held_what_came_with_them_and_a_run_in_the_making():
    """8 buffers of 2^22 fp32 values by rows, 2 of everything at once; requests bring 32 MiB."""
    large, small = _made((8192, 8192), 64 * MIB), _made((128, 128), 1000)
    assert decoding_bytes([small]) == 1000 + 8 * 4 * 128 * 128
    assert decoding_bytes([small, small]) == 2000 + 8 * 4 * 128 * 128
    assert decoding_bytes([large]) == 64 * MIB + 128 * MIB
    assert decoding_bytes([large, small]) == 64 * MIB + 1000 + 128 * MIB
    assert decoding_bytes([large, large, small]) == (64 + 32) * MIB + 128 * MIB
    assert decoding_bytes([large, _made((8192, 8192), 10, None)]) == 64 * MIB + 10 + 512 * MIB


def test_plan_knows_what_decoding_takes_of_every_unit(tmp_path):
    """Blocks of seven linears in 8 bits, a row scale each; nothing else is stored as codes."""
    options = tiny_options(tmp_path)
    stored = {}
    for name, tensor in read_all_tensors(tmp_path / "source").items():
        if "_proj.weight" in name:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = torch.ones(len(tensor), 1)
    quantized = requantized(tmp_path / "source", tmp_path / "fp8", stored, {"quant_method": "fbgemm_fp8"})
    assert build_plan(options, 1)[0].decoding_bytes == {}
    plan, _ = build_plan(tiny_options(tmp_path, source=str(quantized)), 1)
    _, checkpoint = opened(quantized)
    assert len(checkpoint.decoded) == 3 * 7
    for index in range(3):
        mine = {name: t for name, t in stored.items() if f".{index}." in name}
        codes = sum(tensor.nbytes for tensor in mine.values())
        largest = max(tensor.numel() for tensor in mine.values())
        assert plan.decoding_bytes[f"block-{index:05d}"] == codes + 8 * 4 * largest
    assert len(plan.decoding_bytes) == 3


def test_decoding_is_no_part_of_a_plans_identity(tmp_path):
    plan, _ = build_plan(tiny_options(tmp_path), 1)
    assert dataclasses.replace(plan, decoding_bytes={"block-00000": 1}).identity() == plan.identity()
