"""Everything compressed-tensors stores, written and read back by the package itself."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from quantlib.errors import CheckpointError, PackingError
from tests.support.quantized_sources import opened, read_in_short_runs, write_source

LINEAR = "model.layers.0.self_attn.q_proj"


def scheme_of(**weights):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def parameters(rows, columns, scale_shape, *, has_zeros=False, scale_dtype=torch.bfloat16, **others):
    """A weight that is coarser than the grid is wide, with positive scales."""
    generator = torch.Generator().manual_seed(rows + columns)
    zero = torch.randint(-6, 6, scale_shape, generator=generator).to(torch.int8)
    return {
        "weight": torch.randn(rows, columns, generator=generator).bfloat16(),
        "weight_scale": (0.02 + 0.3 * torch.rand(scale_shape, generator=generator)).to(scale_dtype),
        **({"weight_zero_point": zero} if has_zeros else {}),
        **others,
    }


def config_of(layout, scheme):
    """The quantization_config that the package writes."""
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=layout, ignore=["lm_head"])
    return config.model_dump(mode="json")


def source_of(folder, layout, scheme, values):
    """Its folder, and the weight as upstream gives it back."""
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(values, scheme)
    restored = compressor.decompress(dict(stored), scheme)["weight"]
    tensors = {f"{LINEAR}.{name}": tensor for name, tensor in stored.items()}
    write_source(folder, {**tensors, "lm_head.weight": torch.ones(4, 4)}, config_of(layout, scheme))
    return restored


INTEGERS = {"type": "int", "dynamic": False}


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("rows", "columns", "size"), [(192, 96, 32), (40, 70, None), (300, 64, 16)])
def test_packed_integers(tmp_path, bits, is_symmetric, rows, columns, size):
    how = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    scheme = scheme_of(num_bits=bits, symmetric=is_symmetric, **how, **INTEGERS)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = parameters(rows, columns, (rows, columns // size if size else 1), has_zeros=not is_symmetric)
    if not is_symmetric:
        values["weight_zero_point"].clamp_(low, high)
    restored = source_of(tmp_path, "pack-quantized", scheme, values)
    found = read_in_short_runs(tmp_path)
    assert set(found) == {f"{LINEAR}.weight", "lm_head.weight"}
    assert torch.equal(found[f"{LINEAR}.weight"], restored.bfloat16())


def test_packed_integers_in_reordered_groups(tmp_path):
    scheme = scheme_of(num_bits=4, symmetric=True, strategy="group", group_size=32, **INTEGERS)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(parameters(64, 96, (64, 3)), scheme)
    restored = compressor.decompress(dict(stored), scheme)["weight"]
    # What releases before 2026 wrote: columns in another order, and the group of each.
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    codes = unpack_from_int32(stored["weight_packed"], 4, stored["weight_shape"])
    stored |= {"weight_packed": pack_to_int32(codes[:, order], 4), "weight_g_idx": (order // 32).int()}
    tensors = {f"{LINEAR}.{name}": tensor for name, tensor in stored.items()}
    write_source(tmp_path, tensors, config_of("pack-quantized", scheme))
    assert torch.equal(read_in_short_runs(tmp_path)[f"{LINEAR}.weight"], restored[:, order].bfloat16())


@pytest.mark.parametrize(
    ("layout", "weights", "scale_shape"),
    [
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (200, 1)),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}, (1,)),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (200, 1)),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (1,)),
        (
            "naive-quantized",
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
            (200, 8),
        ),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            (2, 2),
        ),
    ],
)
def test_a_value_an_element(tmp_path, layout, weights, scale_shape):
    scheme = scheme_of(symmetric=True, dynamic=False, **weights)
    restored = source_of(tmp_path, layout, scheme, parameters(200, 256, scale_shape))
    assert torch.equal(read_in_short_runs(tmp_path)[f"{LINEAR}.weight"], restored.bfloat16())


def test_integers_with_zero_points(tmp_path):
    scheme = scheme_of(num_bits=8, type="int", strategy="channel", symmetric=False, dynamic=False)
    restored = source_of(tmp_path, "int-quantized", scheme, parameters(70, 64, (70, 1), has_zeros=True))
    assert torch.equal(read_in_short_runs(tmp_path)[f"{LINEAR}.weight"], restored.bfloat16())


def test_nvfp4(tmp_path):
    scheme = scheme_of(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, dynamic=False
    )
    values = parameters(
        130, 64, (130, 4), scale_dtype=torch.float32, weight_global_scale=torch.tensor([37.0])
    )
    values["weight_scale"] *= 20
    restored = source_of(tmp_path, "nvfp4-pack-quantized", scheme, values)
    assert torch.equal(read_in_short_runs(tmp_path)[f"{LINEAR}.weight"], restored.bfloat16())


@pytest.mark.parametrize(("layout", "bits"), [("mxfp4-pack-quantized", 4), ("mxfp8-quantized", 8)])
def test_powers_of_two_for_groups_of_32(tmp_path, layout, bits):
    scheme = scheme_of(
        num_bits=bits, type="float", strategy="group", group_size=32, symmetric=True, dynamic=False
    )
    scheme.weights.scale_dtype = torch.uint8
    values = parameters(130, 64, (130, 2))
    values["weight_scale"] = 2.0 ** torch.randint(-6, 3, (130, 2))
    restored = source_of(tmp_path, layout, scheme, values)
    assert torch.equal(read_in_short_runs(tmp_path)[f"{LINEAR}.weight"], restored.bfloat16())


def test_scales_of_activations_are_dropped_with_a_reason(tmp_path):
    tensors = {
        f"{LINEAR}.weight": torch.ones(4, 4, dtype=torch.int8),
        f"{LINEAR}.weight_scale": torch.ones(4, 1),
        f"{LINEAR}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    _, checkpoint = opened(write_source(tmp_path, tensors, {"quant_method": "compressed-tensors"}))
    assert list(checkpoint.tensors) == [f"{LINEAR}.weight"]
    assert set(checkpoint.dropped) == {f"{LINEAR}.input_scale", "model.layers.0.self_attn.k_scale"}


@pytest.mark.parametrize(
    ("changed", "values", "said"),
    [
        ({}, {"weight_scale": None}, "with its .*weight_scale"),
        ({}, {"weight_shape": None}, "and a weight_shape"),
        ({"config_groups": {}}, {}, "found None bits"),
        ({"config_groups": {"W4A16": ["Linear"]}}, {}, "presets are not expanded"),
        ({"transform_config": {"config_groups": {"u": {}}}}, {}, "transforms or sparse"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "transforms or sparse"),
    ],
)
def test_what_cannot_be_read_is_refused_when_it_is_opened(tmp_path, changed, values, said):
    scheme = scheme_of(num_bits=4, symmetric=True, strategy="group", group_size=32, **INTEGERS)
    stored = BaseCompressor.get_value_from_registry("pack-quantized").compress(
        parameters(64, 64, (64, 2)), scheme
    )
    tensors = {f"{LINEAR}.{n}": t for n, t in {**stored, **values}.items() if t is not None}
    write_source(tmp_path, tensors, {**config_of("pack-quantized", scheme), **changed})
    with pytest.raises((CheckpointError, PackingError), match=said):
        opened(tmp_path)


def test_a_shape_that_contradicts_the_codes_is_told_when_it_is_read(tmp_path):
    scheme = scheme_of(num_bits=4, symmetric=True, strategy="group", group_size=32, **INTEGERS)
    values = parameters(64, 64, (64, 2))
    stored = BaseCompressor.get_value_from_registry("pack-quantized").compress(values, scheme)
    stored["weight_shape"] = torch.tensor([64, 60])
    tensors = {f"{LINEAR}.{name}": tensor for name, tensor in stored.items()}
    write_source(tmp_path, tensors, config_of("pack-quantized", scheme))
    with pytest.raises(CheckpointError, match=r"weight_shape is \[64, 60\]"):
        read_in_short_runs(tmp_path)
