"""Whole jobs on a tiny model in this process: what they write, report, refuse and resume."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import (
    CorpusError,
    NumericsError,
    PackingError,
    PlanMismatchError,
    QuantError,
    RecipeError,
)
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.stages import Progress
from quantlib.storage import normalize_uri, open_store
from tests.support.tiny_jobs import WORDS, shard_digests, tiny_options, tiny_source, tiny_text
from tests.support.tiny_models import read_all_tensors


def _output(options) -> Path:
    return Path(options.output)


def _biased_source(folder: Path) -> Path:
    return tiny_source(folder, attention_bias=True, mlp_bias=True)


def _tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


@pytest.mark.parametrize(
    "given",
    [
        {"format": "compressed-tensors", "method": "gptq"},
        {"format": "compressed-tensors", "method": "rtn"},
        {"format": "gptq", "method": "gptq"},
        {"format": "gptq", "method": "rtn"},
        {"format": "awq", "method": "gptq", "scheme": "W4A16_ASYM"},
        {"format": "awq", "method": "rtn"},
        {"format": "bitsandbytes", "method": "gptq", "scheme": "W8A16", "group_size": -1},
        {"target": "bitsandbytes", "method": "rtn", "scheme": "W8A16", "group_size": -1},
        {"scheme": "W5A16", "method": "rtn", "scale_search": "absmax"},
        {"scheme": "W5A16", "method": "gptq"},
        {"scheme": "W6A16_ASYM", "method": "gptq"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_conversion_finished_output_is_verified_and_evaluates_to_the_reported_perplexity(tmp_path, given):
    options = tiny_options(tmp_path, **given)
    report = quantize(options)
    uri = normalize_uri(options.output)
    verified = verify_checkpoint(
        open_store(uri), uri, source_uri=normalize_uri(options.source), source_store=open_store(uri)
    )
    assert verified.findings == ()
    figures = report["evaluation"]
    assert figures["tokens"] == 5 * 31
    for model, key in ((options.source, "perplexity_original"), (options.output, "perplexity_quantized")):
        measured = evaluate_checkpoint(
            model,
            options.evaluation,
            text_column="text",
            sequences=5,
            sequence_length=32,
            threads=1,
            device="cpu",
        )
        assert math.isclose(measured["perplexity"], figures[key], rel_tol=1e-6), model
    assert figures["kl_divergence"] > 0
    assert [row["name"] for row in report["blocks"][0]["linears"]][:1] == ["model.layers.0.self_attn.q_proj"]
    assert len(report["blocks"][0]["linears"]) == 7


def test_conversion_of_experts_without_calibration_quantizes_each_and_keeps_the_router(tmp_path):
    tiny_source(tmp_path / "source", "qwen3_moe", moe_intermediate_size=32, mlp_only_layers=[])
    tiny_text(tmp_path / "evaluation.jsonl", seed=2)
    options = tiny_options(tmp_path, method="rtn", calibration=None)
    report = quantize(options)
    names = set(_tensors(options.output))
    for expert in range(4):
        assert f"model.layers.1.mlp.experts.{expert}.down_proj.weight_packed" in names
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(_tensors(options.output)[router], _tensors(options.source)[router])
    assert 0 < report["evaluation"]["kl_divergence"] < 1


def test_conversion_gptq_has_smaller_layer_errors_than_rounding_to_nearest(tmp_path):
    gptq = quantize(tiny_options(tmp_path, output=str(tmp_path / "gptq")))
    rtn = quantize(tiny_options(tmp_path, output=str(tmp_path / "rtn"), method="rtn"))
    gptq_error = [block["relative_error"] for block in gptq["blocks"]]
    rtn_error = [block["relative_error"] for block in rtn["blocks"]]
    assert sum(gptq_error) < 0.8 * sum(rtn_error)


def test_conversion_everything_not_quantized_is_copied_byte_for_byte(tmp_path):
    options = tiny_options(tmp_path)
    quantize(options)
    source, output = _tensors(options.source), _tensors(options.output)
    for name, tensor in source.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(output[name].view(torch.int16), tensor.view(torch.int16)), name
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in copied:
        assert (_output(options) / name).read_bytes() == (Path(options.source) / name).read_bytes()


@pytest.mark.parametrize("given", [{}, {"propagation": "quantized", "correct_targets": True}])
def test_conversion_biases_keep_the_mean_output_of_every_linear(tmp_path, given):
    biased = str(_biased_source(tmp_path / "biased"))
    options = tiny_options(tmp_path, source=biased, correct_biases=True, **given)
    report = quantize(options)
    before, after = _mean_outputs(options.source, options), _mean_outputs(options.output, options)
    left = tiny_options(tmp_path, source=biased, output=str(tmp_path / "left"), **given)
    quantize(left)
    uncorrected = _mean_outputs(left.output, left)
    # The first block sees the same inputs in both models, the others only up to what rounding did before.
    for name in (name for name in before if ".layers.0.self_attn" in name and "o_proj" not in name):
        gap, gap_without = (before[name] - found[name] for found in (after, uncorrected))
        assert gap.norm() < 0.1 * gap_without.norm(), name
    rows = [row for block in report["blocks"] for row in block["linears"]]
    assert len(rows) == 21 and all(row["bias_change"] > 0 for row in rows)
    uri = normalize_uri(options.output)
    verified = verify_checkpoint(open_store(uri), uri, source_uri=normalize_uri(options.source))
    assert verified.findings == ()


def test_conversion_leaves_biases_alone_where_nothing_is_known_of_the_inputs(tmp_path):
    biased = str(_biased_source(tmp_path / "biased"))
    options = tiny_options(tmp_path, source=biased, method="rtn", correct_biases=True)
    report = quantize(options)
    source, output = _tensors(options.source), _tensors(options.output)
    biases = [name for name in source if name.endswith(".bias")]
    assert len(biases) == 21
    assert all(torch.equal(source[name], output[name]) for name in biases)
    assert all(row["bias_change"] is None for block in report["blocks"] for row in block["linears"])


def _mean_outputs(folder: str, options) -> dict[str, torch.Tensor]:
    """Linear -> mean of its output over the calibration rows, by transformers' own forward in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    documents = [json.loads(line)["text"] for line in Path(options.calibration).read_text().splitlines()]
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [token for text in documents for token in [*tokenizer(text)["input_ids"], separator]]
    rows_BT = torch.tensor(ids[: options.sequences * 32]).reshape(options.sequences, 32)
    config = AutoConfig.from_pretrained(options.source)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source, stored = _tensors(options.source), _tensors(folder)
    for name, parameter in model.named_parameters():
        packed = f"{name}_packed"
        if packed not in stored:
            parameter.data.copy_(stored.get(name, source["model.embed_tokens.weight"]))
            continue
        shifts = torch.arange(0, 32, 4)
        codes = (stored[packed][..., None].to(torch.int64) >> shifts) & 15
        codes = codes.flatten(1)[:, : parameter.shape[1]] - 8
        scales = stored[f"{name}_scale"].float().repeat_interleave(options.group_size, dim=1)
        parameter.data.copy_(codes * scales)
    means: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(
                lambda _m, _i, output, name=name: means.update({name: output.flatten(0, 1).mean(0)})
            )
    with torch.inference_mode():
        model(rows_BT, use_cache=False)
    return means


def test_conversion_without_data_converts_unit_by_unit_to_the_same_bytes(tmp_path):
    streamed = tiny_options(tmp_path, method="rtn", output=str(tmp_path / "streamed"))
    alone = tiny_options(
        tmp_path, method="rtn", calibration=None, evaluation=None, output=str(tmp_path / "alone")
    )
    quantize(streamed)
    report = quantize(alone)
    assert report["evaluation"] is None
    assert report["calibration"] is None
    assert shard_digests(_output(alone)) == shard_digests(_output(streamed))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"propagation": "quantized"},
        {"propagation": "quantized", "correct_targets": True},
        {
            "propagation": "quantized",
            "correct_targets": True,
            "rules": [{"match": "*.layers.1.*", "method": "rtn"}, {"match": "*.o_proj", "method": "rtn"}],
        },
    ],
    ids=["original", "quantized", "corrected", "corrected beside rtn"],
)
@pytest.mark.parametrize("is_biased", [False, True], ids=["plain", "biased"])
def test_conversion_interrupted_anywhere_is_finished_to_the_same_bytes(tmp_path, given, is_biased):
    if is_biased:
        given = {**given, "source": str(_biased_source(tmp_path / "biased")), "correct_biases": True}
    undisturbed = tiny_options(tmp_path, output=str(tmp_path / "whole"), **given)
    expected = quantize(undisturbed)
    stopped = tiny_options(tmp_path, output=str(tmp_path / "stopped"), **given)

    class StopError(Exception):
        pass

    def stop_at(label: str):
        def on_progress(progress: Progress) -> None:
            if progress.label == label:
                raise StopError

        return on_progress

    for label in ("block 1/3: capture", "block 2/3: evaluate", "block 3/3: solve", "head"):
        with pytest.raises(StopError):
            quantize(stopped, stop_at(label))
        assert not (_output(stopped) / "config.json").exists()
        assert not (_output(stopped) / "model.safetensors.index.json").exists()
    report = quantize(stopped)
    assert shard_digests(_output(stopped)) == shard_digests(_output(undisturbed))
    assert "block-00000" in report["history"]["reused_units"]
    assert report["evaluation"] == expected["evaluation"]
    assert [b["linears"] for b in report["blocks"]] == [b["linears"] for b in expected["blocks"]]


def test_conversion_finished_output_is_left_alone(tmp_path):
    options = tiny_options(tmp_path)
    first = quantize(options)
    before = shard_digests(_output(options))
    assert quantize(options) == json.loads(json.dumps(first))
    assert shard_digests(_output(options)) == before


def test_conversion_quantized_propagation_calibrates_on_quantized_activations(tmp_path):
    original = tiny_options(tmp_path, output=str(tmp_path / "original"))
    quantized = tiny_options(tmp_path, output=str(tmp_path / "quantized"), propagation="quantized")
    quantize(original)
    quantize(quantized)
    a, b = shard_digests(_output(original)), shard_digests(_output(quantized))
    # Block 0 reads the same activations either way; from block 1 on they differ.
    assert a["model-00002-of-00005.safetensors"] == b["model-00002-of-00005.safetensors"]
    assert a["model-00003-of-00005.safetensors"] != b["model-00003-of-00005.safetensors"]


def test_conversion_corrected_targets_bring_later_blocks_closer_to_the_original(tmp_path):
    given = {"propagation": "quantized", "scheme": "W2A16_ASYM", "sequences": 24}
    plain = tiny_options(tmp_path, output=str(tmp_path / "plain"), correct_targets=False, **given)
    corrected = tiny_options(tmp_path, output=str(tmp_path / "corrected"), correct_targets=True, **given)
    before, after = ([b["relative_error"] for b in quantize(o)["blocks"]] for o in (plain, corrected))
    # Block 0 reads what the original model reads: there is nothing to correct.
    assert after[0] == before[0]
    assert after[-1] < before[-1]
    a, b = shard_digests(_output(plain)), shard_digests(_output(corrected))
    assert a["model-00002-of-00005.safetensors"] == b["model-00002-of-00005.safetensors"]


def _interrupt(options, label: str) -> None:
    """Run a job up to the stage with this label."""

    def stop(progress: Progress) -> None:
        if progress.label == label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(options, stop)


def _assert_refused(options, kind: type[QuantError], words: str) -> None:
    before = sorted(Path(options.output).parent.rglob("*"))
    with pytest.raises(kind, match=words) as caught:
        quantize(options)
    assert caught.value.before_work
    assert sorted(Path(options.output).parent.rglob("*")) == before


def test_conversion_of_inputs_whose_squares_overflow_names_block_cell_and_linear(tmp_path):
    options = tiny_options(tmp_path)
    # The block's output stays what it was.
    factors = {"post_attention_layernorm": 1e25, "mlp.gate_proj": 1e-25, "mlp.up_proj": 1e-25}
    for shard in Path(options.source).glob("*.safetensors"):
        tensors = load_file(shard)
        for module, factor in factors.items():
            name = f"model.layers.1.{module}.weight"
            if name in tensors:
                tensors[name] *= factor
        save_file(tensors, shard, metadata={"format": "pt"})
    wanted = r"model\.layers\.1, calibration cell 0 \(rows 0 to 9\): .*model\.layers\.1\.mlp\.gate_proj"
    with pytest.raises(NumericsError, match=wanted) as caught:
        quantize(options)
    assert (caught.value.facts["block"], caught.value.facts["cell"]) == (1, 0)


def test_conversion_of_a_later_cell_beyond_the_headroom_of_the_first_names_cell_and_linear(tmp_path):
    options = tiny_options(tmp_path, sequences=40, sequence_length=128, evaluation=None)
    # A channel that only the last word has, and that is strong in what attention reads.
    for shard in Path(options.source).glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name == "model.embed_tokens.weight":
                tensor[:, 5] = 0.0
                tensor[-1, 5] = 1.0
            elif name == "model.layers.0.input_layernorm.weight":
                tensor[5] = 1e5
        save_file(tensors, shard, metadata={"format": "pt"})
    # 32 sequences make a cell.
    words = (WORDS[:-1] * 50)[: 32 * 128] + [WORDS[-1]] * 2000
    (tmp_path / "calibration.jsonl").write_text(json.dumps({"text": " ".join(words)}))
    with pytest.raises(NumericsError, match="a thousand times on average") as caught:
        quantize(options)
    assert (caught.value.facts["block"], caught.value.facts["cell"]) == (0, 1)
    assert caught.value.facts["linear"] == "model.layers.0.self_attn.q_proj"


def test_conversion_refuses_gptq_without_calibration_text(tmp_path):
    with pytest.raises(RecipeError, match="calibration"):
        tiny_options(tmp_path, calibration=None)


def test_conversion_refuses_empty_calibration_text(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    _assert_refused(tiny_options(tmp_path, calibration=str(tmp_path / "empty.jsonl")), CorpusError, "empty")


def test_conversion_refuses_a_group_size_the_format_cannot_hold(tmp_path):
    _assert_refused(tiny_options(tmp_path, group_size=40), PackingError, "40")


def test_conversion_refuses_an_output_that_holds_something_else(tmp_path):
    options = tiny_options(tmp_path)
    _output(options).mkdir()
    (_output(options) / "notes.txt").write_text("mine")
    _assert_refused(options, PlanMismatchError, "already holds something else")


def test_conversion_refuses_another_job_on_the_same_output(tmp_path):
    quantize(tiny_options(tmp_path))
    _assert_refused(tiny_options(tmp_path, scheme="W8A16"), PlanMismatchError, "scheme was W4A16, now W8A16")


def test_conversion_refuses_sequences_longer_than_the_model_can_read(tmp_path):
    _assert_refused(tiny_options(tmp_path, sequence_length=1024), RecipeError, "128 positions")


def test_conversion_refuses_a_source_replaced_since_it_began(tmp_path):
    options = tiny_options(tmp_path)
    _interrupt(options, "block 2/3: capture")
    shard = sorted(Path(options.source).glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-2] + b"\x00\x01")
    with pytest.raises(PlanMismatchError, match="source objects were replaced"):
        quantize(options)


def test_conversion_of_a_changed_config_is_refused_on_resume(tmp_path):
    options = tiny_options(tmp_path)
    _interrupt(options, "block 2/3: capture")
    path = Path(options.source) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    with pytest.raises(PlanMismatchError, match="replaced"):
        quantize(options)


def test_conversion_resumes_with_the_threads_it_found_itself(tmp_path):
    options = tiny_options(tmp_path, threads_per_worker=None)
    _interrupt(options, "block 2/3: capture")
    threads = json.loads((tmp_path / "output.quantmill" / "plan.json").read_text())["threads"]
    assert quantize(tiny_options(tmp_path, threads_per_worker=threads))["history"]["reused_units"]


def test_conversion_finished_without_evaluation_points_to_the_command_that_measures(tmp_path):
    quantize(tiny_options(tmp_path, evaluation=None))
    _assert_refused(tiny_options(tmp_path), PlanMismatchError, "quantmill evaluate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is missing is wanted")
def test_conversion_device_that_is_not_there_is_refused(tmp_path):
    _assert_refused(tiny_options(tmp_path, device="cuda"), RecipeError, "cuda")


def test_conversion_without_evaluation_resumes_without_running_finished_blocks(tmp_path):
    options = tiny_options(tmp_path, evaluation=None)
    _interrupt(options, "head")
    assert "forward" not in quantize(options)["stages"]


def test_quantized_bytes_are_those_of_all_tensors_that_stand_for_weights(tmp_path):
    """Names such as weight.absmax and weight.quant_state.bitsandbytes__nf4 too."""
    tiny_source(tmp_path / "source", hidden_size=64, intermediate_size=128)
    report = quantize(
        tiny_options(
            tmp_path, scheme="NF4_DQ", group_size=None, method="rtn", calibration=None, evaluation=None
        )
    )
    written = read_all_tensors(tmp_path / "output")
    of_linears = [tensor for name, tensor in written.items() if "_proj.weight" in name]
    assert report["quantized"]["size_bytes"] == sum(tensor.nbytes for tensor in of_linears)
    assert any(name.endswith("_proj.weight.absmax") for name in written)
