"""Token rows against an independent recipe, laziness, digests, and tokenizers beside a checkpoint."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlib.calibration.corpus import load_tokenizer, rows_digest, separator_id, token_rows
from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import CheckpointError, CorpusError
from quantlib.storage import open_store

WORDS = [f"w{i}" for i in range(20)]


def word_tokenizer(*specials, **roles):
    """Word i has id i; special tokens follow."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *specials])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A tokenizer file may ask for truncation and padding; rows must not be touched by it.
    inner.enable_truncation(3)
    inner.enable_padding(length=7)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def random_documents(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12))) for _ in range(count)]


def expected_stream(documents, separator):
    """All tokens by the plain reading of the recipe: word i is token i."""
    stream = []
    for position, document in enumerate(documents):
        stream += ([separator] if position else []) + [int(word[1:]) for word in document.split()]
    return stream


def test_token_rows_are_the_stream_of_documents_cut_into_rows():
    documents = random_documents(300)
    rows = token_rows(
        documents, word_tokenizer("<|endoftext|>"), num_sequences=9, sequence_length=100, seed=0
    )
    assert rows.dtype == torch.int32
    assert rows.shape == (9, 100)
    assert rows.flatten().tolist() == expected_stream(documents, separator=20)[:900]


def test_token_rows_seed_shuffles_documents():
    documents = random_documents(200)
    tokenizer = word_tokenizer("<|endoftext|>")
    shuffled = list(documents)
    random.Random(3).shuffle(shuffled)
    rows = token_rows(iter(documents), tokenizer, num_sequences=2, sequence_length=64, seed=3)
    assert rows.flatten().tolist() == expected_stream(shuffled, separator=20)[:128]
    assert documents == random_documents(200)


def test_token_rows_reads_no_further_than_needed():
    read = []

    def many():
        for number in range(10_000):
            read.append(number)
            yield "w1 w2 w3"

    rows = token_rows(many(), word_tokenizer("<|endoftext|>"), num_sequences=4, sequence_length=50, seed=0)
    assert rows.shape == (4, 50)
    # 50 documents of 4 tokens with their separator fill the rows; the rest is one tokenizer call ahead.
    assert len(read) <= 50 + 64


def test_token_rows_exactly_enough_text_is_enough():
    documents = ["w1 w2", "w3"]
    rows = token_rows(documents, word_tokenizer("<|endoftext|>"), num_sequences=2, sequence_length=2, seed=0)
    assert rows.tolist() == [[1, 2], [20, 3]]


@pytest.mark.parametrize(
    ("num_sequences", "sequence_length", "message"),
    [
        (1, 8, "text has 7 tokens, which is less than one sequence of 8"),
        (4, 2, "4 sequences of 2 are 8 tokens; .* has 7, enough for 3"),
    ],
)
def test_token_rows_too_little_text_tells_what_there_is(num_sequences, sequence_length, message):
    with pytest.raises(CorpusError, match=message):
        token_rows(
            ["w1 w2 w3", "w4 w5 w6"],
            word_tokenizer("<|endoftext|>"),
            num_sequences=num_sequences,
            sequence_length=sequence_length,
            seed=0,
        )


def test_separator_is_endoftext_then_eos_then_bos():
    assert separator_id(word_tokenizer("</s>", "<|endoftext|>", eos_token="</s>", bos_token="w5")) == 21
    assert separator_id(word_tokenizer("</s>", eos_token="</s>", bos_token="w5")) == 20
    assert separator_id(word_tokenizer("<s>", bos_token="<s>")) == 20
    assert separator_id(word_tokenizer(eos_token="w0")) == 0
    with pytest.raises(CorpusError, match="neither"):
        separator_id(word_tokenizer())


def test_rows_digest_is_sha256_of_shape_and_ids():
    rows = torch.tensor([[1, 256], [-1, 70000]], dtype=torch.int32)
    content = "020000000000000002000000000000000100000000010000ffffffff70110100"
    assert rows_digest(rows) == hashlib.sha256(bytes.fromhex(content)).hexdigest()
    assert rows_digest(rows.to(torch.int64)) == rows_digest(rows)
    assert rows_digest(rows.t().contiguous().t()) == rows_digest(rows)


def test_rows_digest_differs_by_shape_and_order():
    rows = torch.arange(12, dtype=torch.int32)
    digests = {rows_digest(rows.reshape(shape)) for shape in ((3, 4), (4, 3), (1, 12))}
    assert len(digests | {rows_digest(rows.flip(0).reshape(3, 4))}) == 4


def checkpoint_with(folder: Path, names=None, **config):
    """The side files of a folder as `open_checkpoint` lists them, without shards."""
    store = open_store(f"file://{folder}")
    infos = {info.uri.rpartition("/")[2]: info for info in store.list(f"file://{folder}")}
    return store, Checkpoint(
        uri=f"file://{folder}",
        config={"model_type": "llama"} | config,
        shards={},
        tensors={},
        stored={},
        side_files=infos,
    )


def test_load_tokenizer_gives_the_ids_of_the_one_beside_the_shards(tmp_path):
    word_tokenizer("<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(tmp_path)
    loaded = load_tokenizer(*checkpoint_with(tmp_path))
    rows = token_rows(["w3 w4", "w5"], loaded, num_sequences=1, sequence_length=4, seed=0)
    assert rows.tolist() == [[3, 4, 20, 5]]


def test_load_tokenizer_runs_no_code_of_the_checkpoint(tmp_path):
    word_tokenizer("<|endoftext|>").save_pretrained(tmp_path)
    marker = tmp_path / "was_run"
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    path = tmp_path / "tokenizer_config.json"
    code = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    settings = json.loads(path.read_text()) | {"auto_map": code, "tokenizer_class": "EvilTokenizer"}
    path.write_text(json.dumps(settings))
    loaded = load_tokenizer(*checkpoint_with(tmp_path, auto_map=code))
    assert loaded("w7", add_special_tokens=False)["input_ids"] == [7]
    assert not marker.exists()


def test_load_tokenizer_without_one_is_one_clear_error(tmp_path):
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer \(tokenizer.json"):
        load_tokenizer(*checkpoint_with(tmp_path))


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[1]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "Unheard"}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
    ],
)
def test_load_tokenizer_damaged_is_one_clear_error(tmp_path, name, damaged):
    word_tokenizer("<|endoftext|>").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(*checkpoint_with(tmp_path))
