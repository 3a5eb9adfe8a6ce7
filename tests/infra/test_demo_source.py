"""The demo's text splits and its reuse of finished pieces."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo_source():
    spec = importlib.util.spec_from_file_location("demo_source", ROOT / "infra/demo_source.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(title: str, extract: str) -> dict[str, str]:
    return {"title": title, "extract": extract, "topic": "x"}


def long_text(letter: str) -> str:
    return letter * 200


def test_split_keeps_long_extracts_once_in_seeded_order(demo_source):
    summaries = [summary(letter.upper(), long_text(letter)) for letter in "kjihgfedcba"]
    summaries += [summary("Z", long_text("a")), summary("Short", "s" * 199)]
    calibration, evaluation = demo_source.split_documents(summaries)
    expected = [f"{letter.upper()}\n\n{long_text(letter)}\n" for letter in "abcdefghijk"]
    random.Random(0).shuffle(expected)
    assert evaluation == expected[:2]
    assert calibration == expected[2:]


def test_split_does_not_depend_on_the_order_of_the_file(demo_source):
    summaries = [summary(f"T{i}", f"{i:03d} " * 60) for i in range(50)]
    assert demo_source.split_documents(summaries) == demo_source.split_documents(summaries[::-1])


def prepared_downloads(folder: Path) -> None:
    (folder / "downloads").mkdir(parents=True)
    found = {f"T{i}": summary(f"T{i}", f"{i:03d} " * 60) for i in range(50)}
    (folder / "downloads/summaries_en-us.json").write_text(json.dumps(found))


def test_text_is_written_as_jsonl_and_reused(demo_source, tmp_path):
    prepared_downloads(tmp_path)
    files = demo_source.prepare_text(tmp_path)
    rows = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in files]
    assert [len(found) for found in rows] == [40, 10]
    assert not set(rows[0]) & set(rows[1])
    (tmp_path / "downloads/summaries_en-us.json").write_text("{}")
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in demo_source.prepare_text(tmp_path)] == before


def test_half_made_text_is_made_again(demo_source, tmp_path):
    prepared_downloads(tmp_path)
    (tmp_path / "text.partial").mkdir()
    (tmp_path / "text.partial/stale.jsonl").write_text("")
    files = demo_source.prepare_text(tmp_path)
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == sorted(p.name for p in files)
    assert not (tmp_path / "text.partial").exists()


@pytest.mark.slow
def test_source_is_the_model_the_figures_are_about(demo_source):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_source.prepare_model(ROOT / ".demo")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    assert not {path.name for path in folder.iterdir()} & {"model.safetensors", "pytorch_model.bin"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_hidden_layers == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == " Paris"
