"""Whole jobs that write GGUF: what other readers find in the file, and what is promised of every output."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from quantlib.checkpoint.compare import compare_checkpoints
from quantlib.checkpoint.inspect import format_inspection, inspect_checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import PackingError, UnsupportedModelError
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.planner import build_plan
from quantlib.job.stages import Progress
from quantlib.storage import open_store
from tests.support.tiny_jobs import gguf_source, tiny_options, tiny_source, tiny_text

STORE = open_store("file:///")
FIRST = "model-00001-of-00005.gguf"
BLOCK = "model-00002-of-00005.gguf"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_options(root: Path, name: str = "output", **changes):
    if not (root / "source").exists():
        gguf_source(root / "source")
    values = {"format": "gguf", "group_size": None, "output": str(root / name), **changes}
    for number, text in enumerate(("calibration", "evaluation"), start=1):
        if not (root / f"{text}.jsonl").exists():
            tiny_text(root / f"{text}.jsonl", seed=number)
    return tiny_options(root, **values)


def parts(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.gguf"))}


def tensors_of(folder: str | Path) -> dict:
    return {t.name: t for path in sorted(Path(folder).glob("*.gguf")) for t in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def verified(options):
    return verify_checkpoint(STORE, f"file://{options.output}", f"file://{options.source}")


def source_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    checkpoint = open_source(STORE, f"file://{folder}")
    return read_tensors(STORE, checkpoint, list(checkpoint.tensors))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.mark.parametrize(
    ("scheme", "method", "kind"),
    [("W4A16", "gptq", "Q4_0"), ("W4A16_ASYM", "gptq", "Q4_1"), ("W8A16", "rtn", "Q8_0")],
)
def test_output_is_verified_and_evaluates_to_the_reported_perplexity(tmp_path, root, scheme, method, kind):
    gguf_options(root)
    options = gguf_options(root, scheme, scheme=scheme, method=method, output=str(tmp_path / "output"))
    assert options.group_size == 32
    planned = build_plan(options, threads=1)[0].output_bytes
    report = quantize(options)
    assert verified(options).findings == ()
    assert planned == sum(map(len, parts(options.output).values()))
    measured = evaluate_checkpoint(
        options.output,
        options.evaluation,
        text_column="text",
        sequences=5,
        sequence_length=32,
        threads=1,
        device="cpu",
    )
    assert measured["perplexity"] == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)
    kinds = {name: t.tensor_type.name for name, t in tensors_of(options.output).items()}
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.2.ffn_down.weight"] == kind
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    config = json.loads((Path(options.output) / "config.json").read_text())
    assert config["quantization_config"]["format"] == kind
    assert "LlamaForCausalLM" in format_inspection(inspect_checkpoint(STORE, f"file://{options.output}"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_rules_of_transformers_put_every_weight_back_in_its_place(tmp_path, family):
    # They take heads of qwen3 to have 128 dims, and know a mistral as a llama.
    sizes = {"qwen3": {"head_dim": 128}, "mistral": {"sliding_window": None}}.get(family, {})
    gguf_source(tmp_path / "source", family, **sizes)
    options = gguf_options(tmp_path, scheme="W8A16", method="rtn", calibration=None)
    quantize(options)
    assert verified(options).findings == ()
    found, source = source_tensors(options.output), source_tensors(options.source)
    assert set(found) == set(source)
    for name, tensor in source.items():
        if "_proj." not in name or tensor.ndim == 1:
            assert torch.equal(found[name], tensor), name
        else:
            # A step of 8 bits; rows in another order are off by a hundred.
            step = tensor.float().abs().max() / 127
            assert (found[name].float() - tensor.float()).abs().max() <= step, name


def test_first_part_says_what_the_model_is_and_the_others_only_their_number(root):
    options = gguf_options(root, "keys", method="rtn", calibration=None)
    quantize(options)
    fields = fields_of(Path(options.output) / FIRST)
    wanted = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 96,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["\u0120 w"],
        "split.no": 0,
        "split.count": 5,
        "split.tensors.count": 30,
    }
    assert {name: fields[name] for name in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(fields["tokenizer.ggml.tokens"]) == 96
    assert fields["tokenizer.ggml.tokens"][:4] == ["<|endoftext|>", "<s>", "<unk>", "a"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    others = {name for name in fields_of(Path(options.output) / BLOCK) if not name.startswith("GGUF.")}
    assert others == {"general.architecture", "split.no", "split.count", "split.tensors.count"}
    assert not list(Path(options.output).glob("*.index.json"))


def test_chat_template_goes_into_the_file(tmp_path):
    gguf_source(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "source")
    options = gguf_options(tmp_path, method="rtn", calibration=None)
    quantize(options)
    assert fields_of(Path(options.output) / FIRST)["tokenizer.chat_template"] == tokenizer.chat_template


class _StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(root):
    whole = gguf_options(root, "undisturbed", scheme="W4A16_ASYM", embeddings="q8_0")
    expected = quantize(whole)
    options = gguf_options(root, "resumed", scheme="W4A16_ASYM", embeddings="q8_0")

    def stop(progress: Progress) -> None:
        if progress.label == "block 3/3: capture":
            raise _StopError

    with pytest.raises(_StopError):
        quantize(options, stop)
    before = parts(options.output)
    assert 0 < len(before) < 5
    assert not (Path(options.output) / "config.json").exists()
    report = quantize(options)
    assert len(report["history"]["reused_units"]) == len(before)
    assert report["history"]["replayed_blocks"], "the levels of finished blocks were read back"
    assert parts(options.output) == parts(whole.output)
    assert report["evaluation"] == expected["evaluation"]
    assert verified(options).findings == ()


def test_kept_linears_and_biases_are_those_of_the_source(tmp_path):
    gguf_source(tmp_path / "source", attention_bias=True)
    kept = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    rules = [{"match": f"*.{name}", "keep": True} for name in kept]
    rules.append({"match": "*.down_proj", "scheme": "W8A16"})
    options = gguf_options(tmp_path, rules=rules, correct_biases=True)
    quantize(options)
    assert verified(options).findings == ()
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(options.output).items()}
    assert kinds["blk.0.attn_q.weight"] == "BF16"
    assert kinds["blk.0.attn_q.bias"] == kinds["blk.0.attn_output.bias"] == "F32"
    assert kinds["blk.0.attn_output.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    found, source = source_tensors(options.output), source_tensors(options.source)
    for name in (f"model.layers.1.{linear}.{part}" for linear in kept for part in ("weight", "bias")):
        assert torch.equal(found[name], source[name]), name
    corrected = "model.layers.1.self_attn.o_proj.bias"
    assert not torch.equal(found[corrected], source[corrected])


def test_llama_3_gets_its_rotary_divisors(tmp_path):
    gguf_source(tmp_path / "source", rope_parameters=LLAMA3)
    options = gguf_options(tmp_path, method="rtn", calibration=None)
    report = quantize(options)
    assert verified(options).findings == ()
    assert open_source(STORE, f"file://{options.output}").config["rope_parameters"] == LLAMA3
    assert tensors_of(options.output)["rope_freqs.weight"].data.shape == (8,)
    assert fields_of(Path(options.output) / FIRST)["split.tensors.count"] == 31
    measured = evaluate_checkpoint(
        options.output, options.evaluation, text_column="text", sequences=5, sequence_length=32, device="cpu"
    )
    assert measured["perplexity"] == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)


def _damaged(folder: Path, name: str, change) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _zero_scale(folder: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(folder / BLOCK).tensors if t.name == "blk.0.ffn_up.weight")

    def change(content: bytearray) -> None:
        content[tensor.data_offset : tensor.data_offset + 2] = b"\0\0"

    _damaged(folder, BLOCK, change)


def _norm_by_a_bit(folder: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(folder / BLOCK).tensors if t.name == "blk.0.attn_norm.weight")

    def change(content: bytearray) -> None:
        content[tensor.data_offset] ^= 1

    _damaged(folder, BLOCK, change)


def test_two_outputs_are_compared_tensor_by_tensor(root):
    same, other = (
        gguf_options(root, name, method="rtn", calibration=None, evaluation=None, scale_search=search)
        for name, search in (("one", "minmax"), ("two", "absmax"))
    )
    for options in (same, other):
        quantize(options)
    uris = [f"file://{options.output}" for options in (same, other)]
    assert compare_checkpoints(STORE, uris[0], STORE, uris[0]).ok
    findings = compare_checkpoints(STORE, uris[0], STORE, uris[1]).findings
    assert len(findings) == 20 + 1, "21 linears, of which 20 are told"
    assert findings[0].startswith("Tensor model.layers.0.mlp.down_proj.weight_blocks differs in")


FAULTS = {
    "missing part": (
        lambda folder: (folder / BLOCK).unlink(),
        [
            "of 5 parts was begun, 4 are there and number 2 is missing",
            "promise 30 tensors and hold 21",
            "neither kept",
        ],
    ),
    "cut part": (
        lambda folder: _damaged(folder, BLOCK, lambda c: c.__delitem__(slice(-64, None))),
        ["ends at byte"],
    ),
    "zero scale": (_zero_scale, ["1 of the scales of blk.0.ffn_up.weight are zero", "has the sha256"]),
    "changed norm": (_norm_by_a_bit, ["input_layernorm.weight is not as in the source: 1 of its"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["holds no config.json"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_what_is_wrong(root, tmp_path, fault):
    options = gguf_options(root, "sound", method="rtn", calibration=None, evaluation=None)
    if not Path(options.output).exists():
        quantize(options)
    shutil.copytree(options.output, tmp_path / "copy")
    change, expected = FAULTS[fault]
    change(tmp_path / "copy")
    findings = verified(dataclasses.replace(options, output=str(tmp_path / "copy"))).findings
    for words in expected:
        assert any(words in finding for finding in findings), (words, findings)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("gemma", {}, "is written of llama, mistral, qwen2, qwen3 models, found gemma"),
        ("mistral", {"sliding_window": 16}, "cannot say that this mistral model has a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "of type linear",
        ),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 2.0}}, "of type llama3"),
    ],
)
def test_models_that_a_header_cannot_describe_are_refused_in_the_plan(tmp_path, family, settings, said):
    gguf_source(tmp_path / "source", family, **settings)
    with pytest.raises(UnsupportedModelError, match=said):
        build_plan(gguf_options(tmp_path, method="rtn", calibration=None, evaluation=None), threads=1)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_in_the_plan(tmp_path):
    tiny_source(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="found one with a WordLevel vocabulary"):
        build_plan(gguf_options(tmp_path, method="rtn", calibration=None, evaluation=None), threads=1)


def test_other_group_sizes_are_refused_with_the_one_that_fits(root):
    with pytest.raises(PackingError, match="use --group-size 32, or leave it out"):
        build_plan(gguf_options(root, "groups", group_size=16), threads=1)


def test_the_target_llama_cpp_writes_gguf(root):
    options = gguf_options(root, "target", format=None, target="llama.cpp", method="rtn", calibration=None)
    assert (options.format, options.group_size) == ("gguf", 32)
    plan, _ = build_plan(options, threads=1)
    assert plan.units[0].shard == FIRST
    assert set(plan.versions) >= {"gguf"}
    assert all(unit.shard.endswith(".gguf") for unit in plan.units)
