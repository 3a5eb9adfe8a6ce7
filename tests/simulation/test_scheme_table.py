"""What weights take in every scheme: against closed forms and published sizes."""

import json
import math

import pytest

from quantlib.__main__ import main
from quantlib.schemes import SCHEME_NAMES, scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config
from quantlib.simulation.native_products import NATIVE, native_format
from quantlib.simulation.scheme_table import ServedWeights, scheme_table, weights_of_shape
from tests.support.tiny_jobs import tiny_source
from tests.support.tiny_models import read_all_tensors


def _table(line: str, capsys) -> dict:
    assert main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _rows(table: dict) -> dict[str, dict]:
    return {row["scheme"]: row for row in table["rows"]}


@pytest.mark.parametrize(
    ("name", "scheme", "size", "gpus"),
    [
        ("llama-3.1-405b", "FP32", 1.6234e12, 21),
        ("bloom-176b", "FP16", 352.49e9, 5),
        # 405.9 B parameters, 401.6 B of them in codes of 4 bits with a scale of 16 bits for 128 of them.
        ("llama-3.1-405b", "W4A16", 401.648e9 * (4 + 16 / 128) / 8 + 4.205e9 * 2, 3),
    ],
)
def test_models_are_as_large_as_they_are_said_to_be(name, scheme, size, gpus, capsys):
    row = _rows(_table(f"plan shapes:{name} --gpu-memory 80GB", capsys))[scheme]
    assert row["bytes"] == pytest.approx(size, rel=1e-4)
    assert row["gpus"] == gpus


def test_every_scheme_is_a_closed_form_of_one_linear():
    """256 rows of 512 columns in groups of 64, and 1000 parameters beside them."""
    weights = ServedWeights(name="one", linears={(256, 512): 3}, parameters=3 * 256 * 512 + 1000)
    rows = _rows(scheme_table(weights, 10**6, 64))
    assert list(rows) == ["FP32", "FP16", *SCHEME_NAMES]
    groups = 256 * 512 // 64
    for bits in (2, 3, 4, 5, 6, 8):
        codes = 256 * 512 * bits // 8
        assert rows[f"W{bits}A16"]["bytes"] == 2000 + 3 * (codes + 2 * groups)
        assert rows[f"W{bits}A16_ASYM"]["bytes"] == 2000 + 3 * (codes + 2 * groups + groups * bits // 8)
    assert rows["FP8A16"]["bytes"] == 2000 + 3 * (256 * 512 + 2 * 256)
    assert rows["MXFP4A16"]["bytes"] == 2000 + 3 * (256 * 512 // 2 + 256 * 512 // 32)
    assert rows["MXFP8A16"]["bytes"] == 2000 + 3 * (256 * 512 + 256 * 512 // 32)
    assert rows["FP16"]["bytes"] == 2 * weights.parameters == rows["FP32"]["bytes"] / 2
    for row in rows.values():
        assert row["gpus"] == math.ceil(row["bytes"] / 10**6)
        assert row["share"] == row["bytes"] / rows["FP16"]["bytes"]
        assert row["kept"] == 0


def test_linears_without_whole_groups_are_kept_in_16_bits():
    weights = ServedWeights(name="two", linears={(10, 64): 2, (10, 48): 5}, parameters=4000)
    rows = _rows(scheme_table(weights, 10**6, 64))
    assert (rows["W8A16"]["kept"], rows["FP8A16"]["kept"], rows["MXFP8A16"]["kept"]) == (5, 0, 5)
    assert rows["W8A16"]["bytes"] == 2 * (640 + 2 * 10) + 2 * (4000 - 2 * 640)


def test_checkpoint_has_the_table_of_its_shapes(tmp_path, capsys):
    source = tiny_source(tmp_path / "source")
    table = _table(f"plan {source} --gpu-memory 1MB --group-size 32", capsys)
    config = json.loads((source / "config.json").read_text())
    shape = shape_of_config("tiny", config, scheme_from_name("W4A16", 32))
    derived = scheme_table(weights_of_shape(shape), 10**6, 32)
    # Which rows are in one block is not known of linears that are taken together.
    rows, wanted = (
        [row for row in found["rows"] if not row["scheme"].endswith("_BLOCK")] for found in (table, derived)
    )
    assert rows == wanted
    assert table["parameters"] == sum(tensor.numel() for tensor in read_all_tensors(source).values())


def test_linears_that_rules_keep_are_not_counted_as_codes(tmp_path, capsys):
    source = tiny_source(tmp_path / "source")
    (tmp_path / "keep.toml").write_text('group_size = 32\n[[rules]]\nmatch = "*.down_proj"\nkeep = true\n')
    kept, every = (
        _rows(_table(f"plan {source} --gpu-memory 1MB {more}", capsys))
        for more in (f"--recipe {tmp_path}/keep.toml", "--group-size 32")
    )
    # Three blocks of 64 x 96 weights in 16 bits, less their codes and scales.
    saved = 3 * 64 * 96 * 2 - 3 * (64 * 96 // 2 + 2 * 64 * 96 // 32)
    assert kept["W4A16"]["bytes"] - every["W4A16"]["bytes"] == saved


def test_group_size_of_whole_weights_is_taken_at_its_word(capsys):
    assert main(["plan", "shapes:bloom-176b", "--gpu-memory", "141GB", "--group-size", "0"]) == 0
    assert "integers in whole weights" in capsys.readouterr().out


def test_text_says_what_is_native_where(capsys):
    assert main(["plan", "shapes:bloom-176b", "--gpu-memory", "141GB", "--group-size", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "bloom-176b: 176,247,271,424 parameters; integers in whole rows" in shown
    assert "GPUs of 141.0 GB" in shown
    assert "weights only; kernels turn codes into 16-bit numbers" in shown
    for name, generations in NATIVE.items():
        assert f"  {name}: {', '.join(generations)}" in shown


def test_every_native_name_is_explained():
    found = {native_format(scheme_from_name(name)) for name in SCHEME_NAMES} - {None}
    assert {"int4", "int8", "fp8", "mxfp4", "mxfp8"} <= found <= NATIVE.keys()
