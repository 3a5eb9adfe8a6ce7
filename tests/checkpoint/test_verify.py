"""A sound output has no findings; each fault that is put into it is one sentence."""

import hashlib
import json

import numpy as np
import pytest

from quantlib.checkpoint import verify
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.storage import open_store
from tests.support.checkpoints import CONFIG, small_tensors, write_checkpoint

QUANTIZED = "model.layers.1.mlp.up_proj"
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}},
    "ignore": ["model.layers.0.mlp.down_proj"],
}


def _output_tensors():
    """The source with one linear quantized in the names of compressed-tensors."""
    tensors = small_tensors()
    del tensors[f"{QUANTIZED}.weight"]
    tensors[f"{QUANTIZED}.weight_packed"] = "I32", np.ones((16, 1), np.int32)
    tensors[f"{QUANTIZED}.weight_scale"] = "BF16", np.full((16, 2), 0x3F80, np.uint16)
    tensors[f"{QUANTIZED}.weight_shape"] = "I64", np.array([16, 8])
    return tensors


def _write_output(folder, tensors, **changes):
    write_checkpoint(folder, tensors, config={**CONFIG, "quantization_config": QUANTIZATION})
    _write_report(folder, **changes)


def _write_report(folder, **changes):
    shards = [
        {"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "size_bytes": p.stat().st_size}
        for p in sorted(folder.glob("*.safetensors"))
    ]
    report = {"shards": shards, "dropped": {}, **changes}
    (folder / "quantmill_report.json").write_text(json.dumps(report))


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    _write_output(folder, _output_tensors())
    write_checkpoint(tmp_path / "source")
    return folder


def _verify(folder, **options):
    source = f"file://{folder.parent}/source"
    return verify_checkpoint(open_store("file:///"), f"file://{folder}", source, **options)


def _verify_alone(folder):
    return verify_checkpoint(open_store("file:///"), f"file://{folder}")


def _set_scales(output, pattern, dtype="BF16", name=f"{QUANTIZED}.weight_scale"):
    tensors = _output_tensors()
    values = np.full((16, 2), 1, {"BF16": np.uint16}.get(dtype, np.float32))
    values.reshape(-1)[:] = 0x3F80 if dtype == "BF16" else 1.0
    values.reshape(-1)[3] = pattern
    tensors[name] = dtype, values
    _write_output(output, tensors)


def test_sound_output_has_no_findings_and_is_read_whole(output, monkeypatch):
    monkeypatch.setattr(verify, "PIECE_BYTES", 100)
    result = _verify(output)
    assert result.findings == () and result.ok
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    assert (result.num_shards, result.num_bytes) == (3, sum(sizes))
    assert result.num_tensors == len(_output_tensors())


def test_single_file_without_index_is_sound(tmp_path):
    write_checkpoint(tmp_path, num_shards=1)
    _write_report(tmp_path)
    assert verify_checkpoint(open_store("file:///"), f"file://{tmp_path}").findings == ()


@pytest.mark.parametrize("position", [-1, -500])
def test_flipped_bit_is_found_by_the_digest(output, position):
    shard = output / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    (finding,) = [f for f in _verify(output).findings if "sha256" in f]
    assert shard.name in finding and hashlib.sha256(content).hexdigest() in finding


def _remove_shard(output):
    (output / "model-00002-of-00003.safetensors").unlink()


def _cut_shard(output):
    shard = output / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def _add_shard(output):
    (output / "stray.safetensors").write_bytes((output / "model-00001-of-00003.safetensors").read_bytes())


def _edit(name, edit):
    def change(output):
        values = json.loads((output / name).read_text())
        edit(values)
        (output / name).write_text(json.dumps(values))

    return change


INDEX = "model.safetensors.index.json"
REPORT = "quantmill_report.json"
FAULTS = {
    "no config": (lambda o: (o / "config.json").unlink(), ["holds no config.json"]),
    "config not JSON": (lambda o: (o / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "no index": (lambda o: (o / INDEX).unlink(), ["neither"]),
    "index not JSON": (lambda o: (o / INDEX).write_text("{"), ["index.json is not valid JSON"]),
    "index leaves its folder": (
        _edit(INDEX, lambda v: v["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        ["'../x.safetensors'"],
    ),
    "index places a tensor wrongly": (
        _edit(
            INDEX, lambda v: v["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"})
        ),
        ["places tensor model.norm.weight in model-00001", "Tensor model.norm.weight of model-00002"],
    ),
    "index forgets a tensor": (
        _edit(INDEX, lambda v: v["weight_map"].pop("model.norm.weight")),
        ["Tensor model.norm.weight of model-00002"],
    ),
    "wrong total": (
        _edit(INDEX, lambda v: v["metadata"].update(total_size=5)),
        ["total_size of 5 bytes, the tensors have"],
    ),
    "no total": (_edit(INDEX, lambda v: v.pop("metadata")), ["total_size of None"]),
    "missing shard": (
        _remove_shard,
        ["is in the report, but not there", "names the shard model-00002", "total_size", "neither kept"],
    ),
    "truncated shard": (_cut_shard, ["cut off", "has the sha256", "total_size", "neither kept"]),
    "stray shard": (_add_shard, ["report does not name it", "index.json does not name it"]),
    "no report": (lambda o: (o / REPORT).unlink(), ["There is no quantmill_report.json"]),
    "report not JSON": (lambda o: (o / REPORT).write_text("{"), ["quantmill_report.json is not valid JSON"]),
    "report of another kind": (
        lambda o: (o / REPORT).write_text('{"shards": [1, {"name": []}], "dropped": 3}'),
        ["the report does not name it"],
    ),
    "report lacks a shard": (_edit(REPORT, lambda v: v["shards"].pop()), ["the report does not name it"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_a_finding_that_names_it(output, fault):
    change, expected = FAULTS[fault]
    change(output)
    findings = _verify(output).findings
    for words in expected:
        assert any(words in finding for finding in findings), (words, findings)
    for finding in findings:
        assert any(words in finding for words in [*expected, "of model-00001-of-00003.safetensors is not in"])
        assert finding.endswith(".")


@pytest.mark.parametrize("pattern", [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0])
def test_unusable_bf16_scale_is_found(output, pattern):
    _set_scales(output, pattern)
    (finding,) = _verify_alone(output).findings
    assert finding == f"1 of the 32 scales of {QUANTIZED}.weight_scale are zero, infinite or NaN."


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_unusable_scale_of_the_gptq_names_is_found(output, value, dtype):
    _set_scales(output, value, dtype, "model.layers.0.mlp.up_proj.scales")
    (finding,) = _verify_alone(output).findings
    assert "up_proj.scales are zero, infinite or NaN" in finding


def test_smallest_scales_are_usable(output):
    _set_scales(output, 0x0001)
    assert _verify(output).ok


def test_source_tensor_that_vanished_is_found_unless_dropped_with_a_reason(output, tmp_path):
    extra = small_tensors() | {"visual.patch.weight": ("F32", np.ones(2, np.float32))}
    write_checkpoint(tmp_path / "source", extra)
    (finding,) = _verify(output).findings
    assert finding.startswith("Tensor visual.patch.weight of the source is neither kept")
    _write_report(output, dropped={"visual.patch.weight": "no module uses it"})
    assert _verify(output).ok


def test_packed_linear_stands_for_its_weight_and_nothing_else(output, tmp_path):
    for other in ("bias", "weight_scale_inv"):
        extra = {f"{QUANTIZED}.{other}": ("F32", np.ones(2, np.float32))}
        write_checkpoint(tmp_path / "source", small_tensors() | extra)
        (finding,) = _verify(output).findings
        assert finding.startswith(f"Tensor {QUANTIZED}.{other} of the source")


def test_kept_tensor_of_another_shape_or_dtype_is_found(output, tmp_path):
    changed = {"model.norm.weight": ("F32", np.ones((2, 4), np.float32))}
    write_checkpoint(tmp_path / "source", small_tensors() | changed)
    (finding,) = _verify(output).findings
    assert finding == "Tensor model.norm.weight was F32 [2, 4] in the source and is F32 [8]."


def test_many_findings_of_a_kind_are_cut(output, tmp_path):
    extra = {f"visual.{n}": ("F32", np.ones(1, np.float32)) for n in range(50)}
    write_checkpoint(tmp_path / "source", small_tensors() | extra)
    findings = _verify(output).findings
    assert len(findings) == 21
    assert findings[-1] == "30 more findings of this kind are left out."


def test_report_of_the_run_is_used_before_it_is_stored(output):
    report = json.loads((output / REPORT).read_text())
    (output / REPORT).unlink()
    assert _verify(output, report=report).ok


def test_nothing_there_and_unusable_source_are_errors(output, tmp_path):
    with pytest.raises(ObjectNotFoundError):
        verify_checkpoint(open_store("file:///"), f"file://{tmp_path}/void")
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(CheckpointError):
        _verify(output)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_output_in_s3_is_verified_against_a_source_on_disk(output, s3_environment, engine):
    uri = s3_environment.put_folder(output, f"verify-{engine}")
    source = f"file://{output.parent}/source"
    result = verify_checkpoint(open_store(uri, engine), uri, source, open_store(source))
    assert result.ok, result.findings
