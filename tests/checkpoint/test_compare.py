"""Equal checkpoints have no findings however they are cut; each difference put into one is one sentence."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from quantlib.__main__ import main
from quantlib.checkpoint import compare
from quantlib.checkpoint.compare import compare_checkpoints
from quantlib.errors import ObjectNotFoundError
from quantlib.storage import open_store
from tests.support.checkpoints import CONFIG, small_tensors, write_checkpoint

STORE = open_store("file:///")
QUANTIZATION = {"quant_method": "gptq", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints of the same tensors: three shards, and one file in another order."""
    tensors = write_checkpoint(tmp_path / "a", config={**CONFIG, "quantization_config": QUANTIZATION})
    reordered = dict(reversed(tensors.items()))
    config = {**CONFIG, "quantization_config": dict(reversed(QUANTIZATION.items())), "hidden_act": "gelu"}
    write_checkpoint(tmp_path / "b", reordered, num_shards=1, config=config)
    return tmp_path / "a", tmp_path / "b"


def _compare(one, other):
    return compare_checkpoints(STORE, f"file://{one}", STORE, f"file://{other}")


def _rewrite(folder, change):
    """Write b again with changed tensors."""
    tensors = small_tensors()
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, tensors, num_shards=1, config=config)


@pytest.mark.parametrize("piece_bytes", [7, 100, 1 << 20])
def test_equal_tensors_in_other_shards_and_order_have_no_findings(folders, monkeypatch, piece_bytes):
    monkeypatch.setattr(compare, "PIECE_BYTES", piece_bytes)
    result = _compare(*folders)
    assert result.findings == () and result.ok
    tensors = small_tensors()
    width = {"F32": 4, "BF16": 2, "F16": 2}
    assert result.num_tensors == len(tensors)
    assert result.num_bytes == sum(width[dtype] * values.size for dtype, values in tensors.values())


@pytest.mark.parametrize("piece_bytes", [7, 100, 1 << 20])
def test_changed_bytes_are_counted_for_each_tensor(folders, monkeypatch, piece_bytes):
    monkeypatch.setattr(compare, "PIECE_BYTES", piece_bytes)

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][1].reshape(-1)[[0, 63, 127]] ^= 0x0101
        tensors["model.norm.weight"][1].view(np.uint8)[-1] ^= 1

    _rewrite(folders[1], change)
    result = _compare(*folders)
    assert not result.ok
    assert result.findings == (
        "Tensor model.layers.1.mlp.up_proj.weight differs in 6 of its 256 bytes.",
        "Tensor model.norm.weight differs in 1 of its 32 bytes.",
    )


@pytest.mark.parametrize("shape", [(64, 1 << 16), (1, 1 << 22)])
def test_memory_is_that_of_a_few_pieces(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(compare, "PIECE_BYTES", 1 << 20)
    count, values = shape
    tensors = {f"t{n}": ("F32", np.full(values, n, np.float32)) for n in range(count)}
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, tensors, num_shards=1)
    tracemalloc.start()
    try:
        result = _compare(tmp_path / "a", tmp_path / "b")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.ok and result.num_bytes == 16 << 20
    assert peak_bytes < 8 << 20


def test_missing_tensors_are_named_on_either_side(folders):
    _rewrite(folders[1], lambda tensors: tensors.update(extra=tensors.pop("model.scalar")))
    a, b = folders
    expected = {f"Tensor model.scalar is in file://{a} only.", f"Tensor extra is in file://{b} only."}
    assert set(_compare(a, b).findings) == expected
    assert set(_compare(b, a).findings) == expected


def test_another_dtype_or_shape_is_a_finding_and_its_bytes_are_not_compared(folders):
    def change(tensors):
        dtype, values = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = dtype, values.reshape(2, 4)
        tensors["model.nothing"] = "F32", np.zeros((0, 4), np.float32)

    _rewrite(folders[1], change)
    a, b = folders
    result = _compare(a, b)
    assert result.findings == (
        f"Tensor model.norm.weight is F32 [8] in file://{a} and F32 [2, 4] in file://{b}.",
        f"Tensor model.nothing is F16 [0, 4] in file://{a} and F32 [0, 4] in file://{b}.",
    )
    assert result.num_tensors == len(small_tensors()) - 2


def test_quantization_that_differs_is_named_by_path(folders):
    a, b = folders
    config = json.loads((b / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (b / "config.json").write_text(json.dumps(config))
    assert _compare(a, b).findings == (
        "quantization_config.config_groups.group_0.weights.num_bits of config.json is"
        f" 4 in file://{a} and 8 in file://{b}.",
    )
    del config["quantization_config"]["quant_method"]
    config["quantization_config"]["config_groups"]["group_0"] = QUANTIZATION["config_groups"]["group_0"]
    config["quantization_config"]["ignore"] = ["lm_head"]
    (b / "config.json").write_text(json.dumps(config))
    assert _compare(a, b).findings == (
        f'quantization_config.ignore of config.json is absent in file://{a} and ["lm_head"] in file://{b}.',
        f'quantization_config.quant_method of config.json is "gptq" in file://{a} and absent in file://{b}.',
    )
    del config["quantization_config"]
    (b / "config.json").write_text(json.dumps(config))
    (finding,) = _compare(a, b).findings
    assert finding.startswith(
        'quantization_config of config.json is {"quant_method": "gptq", "config_groups"'
    )
    assert finding.endswith(f"and absent in file://{b}.")


def test_many_findings_of_a_kind_are_cut(folders):
    extra = {f"visual.{n}": ("F32", np.ones(1, np.float32)) for n in range(50)}
    _rewrite(folders[1], lambda tensors: tensors.update(extra))
    findings = _compare(*folders).findings
    assert len(findings) == 21
    assert findings[-1] == "30 more findings of this kind are left out."


@pytest.mark.parametrize("broken", [0, 1])
def test_a_damaged_checkpoint_is_a_finding_and_an_absent_one_an_error(folders, tmp_path, broken):
    shard = sorted(folders[broken].glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    result = _compare(*folders)
    (finding,) = result.findings
    assert finding.startswith(f"file://{folders[broken]} cannot be compared: {shard.name} is not an intact")
    assert result.num_tensors == 0
    pair = [folders[0], folders[1]]
    pair[broken] = tmp_path / "void"
    with pytest.raises(ObjectNotFoundError):
        _compare(*pair)


def _write_report(folder):
    shards = [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.safetensors")
    ]
    (folder / "quantmill_report.json").write_text(json.dumps({"shards": shards}))


def test_verify_against_says_the_same_and_exits_0_or_names_differences_and_exits_1(folders, capsys):
    a, b = folders
    _write_report(a)
    line = ["verify", str(a), "--against", str(b)]
    assert main([*line, "--source", str(b)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:3] == [f"tensors of file://{b}:", "  copied     12  0.0 MB  no reason is reported"]
    assert shown[3:] == ["verified", f"against file://{b}: 12 tensors, 1,508 bytes compared", "the same"]
    _rewrite(b, lambda tensors: tensors.pop("model.scalar"))
    assert main(line) == 1
    finding = f"Tensor model.scalar is in file://{a} only."
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "verified"
    assert shown[3:] == [f"  differs: {finding}", "1 difference(s)"]
    assert main([*line, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["findings"] == []
    assert values["against"]["uri"] == f"file://{b}"
    assert values["against"]["findings"] == [finding]


def test_verify_against_nothing_is_a_wrong_request(folders, tmp_path, capsys):
    _write_report(folders[0])
    assert main(["verify", str(folders[0]), "--against", str(tmp_path / "void")]) == 2
    assert "nothing was found at" in capsys.readouterr().err
    assert main(["verify", str(folders[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"] is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_an_output_in_s3_is_compared_with_one_on_disk(folders, s3_environment, engine):
    a, b = folders
    uri = s3_environment.put_folder(a, f"compare-{engine}")
    result = compare_checkpoints(open_store(uri, engine), uri, STORE, f"file://{b}")
    assert result.ok, result.findings
