import json

import pytest
import safetensors
import safetensors.torch
import torch

from quantlib.checkpoint.layout import index_bytes, layout_shard, shard_names
from quantlib.errors import PackingError
from quantlib.job.plan import TensorSpec, UnitPlan


def _spec(name, dtype="F32", shape=(2,)):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _unit(number, *specs):
    return UnitPlan(
        name=f"u{number}", stage="block", block=number, shard=f"s{number}", tensors=specs, copied=()
    )


def test_layout_is_what_the_safetensors_package_reads(tmp_path):
    specs = [
        _spec("z", "BF16", (3,)),
        _spec("a", "I32", (2, 2)),
        _spec("e", "F16", (0, 5)),
        _spec("s", "F32", ()),
    ]
    layout = layout_shard(specs)
    data = bytes(range(layout.size_bytes - len(layout.header)))
    (tmp_path / "x.safetensors").write_bytes(layout.header + data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == ["a", "e", "s", "z"]
        assert file.get_tensor("z").view(torch.uint8).tolist() == [0, 1, 2, 3, 4, 5]
        assert file.get_tensor("a").reshape(-1).view(torch.uint8).tolist() == list(range(6, 22))
        assert file.get_tensor("e").shape == (0, 5)


def test_tensors_stand_in_the_order_given_without_gaps():
    layout = layout_shard([_spec("b", "F32", (3,)), _spec("a", "U8", (5,)), _spec("c", "F64", ())])
    start = len(layout.header)
    assert layout.offsets == {
        "b": (start, start + 12),
        "a": (start + 12, start + 17),
        "c": (start + 17, start + 25),
    }
    assert layout.size_bytes == start + 25
    assert start % 8 == 0


def test_layout_depends_on_specs_alone():
    specs = [_spec("a"), _spec("b")]
    assert layout_shard(specs) == layout_shard(list(specs))
    assert layout_shard(specs) != layout_shard(specs[::-1])


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([_spec("a"), _spec("a")], "'a' would be in one shard twice"),
        ([_spec("__metadata__")], "__metadata__"),
        ([_spec("a", "F128")], "'a' has the dtype 'F128'"),
        ([_spec("a", "F32", (-1,))], "'a' has the shape"),
    ],
)
def test_impossible_shard_is_refused(specs, words):
    with pytest.raises(PackingError, match=words):
        layout_shard(specs)


def test_shard_names_are_five_digits_and_say_how_many():
    assert shard_names(31)[0] == "model-00001-of-00031.safetensors"
    assert shard_names(31)[-1] == "model-00031-of-00031.safetensors"
    assert shard_names(0) == ()


def test_index_lists_every_tensor_and_the_total():
    index = json.loads(
        index_bytes([_unit(1, _spec("b"), _spec("a", "I64", (3,))), _unit(2, _spec("c", "U8"))])
    )
    assert index == {"metadata": {"total_size": 8 + 24 + 2}, "weight_map": {"a": "s1", "b": "s1", "c": "s2"}}
    assert list(index["weight_map"]) == ["a", "b", "c"]


def test_tensor_of_two_units_is_refused():
    with pytest.raises(PackingError, match="'a' would be in s1 and in s2"):
        index_bytes([_unit(1, _spec("a")), _unit(2, _spec("a"))])
