"""Rows of a mix against rows of its sources, and how sequences are shared out."""

import collections
import json
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.calibration.corpus import rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.calibration.mix import mixed_rows
from quantlib.errors import CorpusError, RecipeError
from quantlib.job.text_sources import TextSource, shared_out, text_sources
from tests.calibration.test_chat import CHATS, chat_tokenizer

LENGTH = 8


def write_words(path, words, documents=60):
    chosen = random.Random(str(path.name))
    lines = [json.dumps({"text": " ".join(chosen.choices(words, k=5))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    write_words(tmp_path / "low.jsonl", [f"w{i}" for i in range(1, 10)])
    write_words(tmp_path / "high.jsonl", [f"w{i}" for i in range(10, 20)])
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS))
    return tmp_path


def mixed(folder, value, count, seed=0):
    sources = tuple(
        TextSource(uri=str(folder / source.uri), weight=source.weight) for source in text_sources(value)
    )
    return mixed_rows(
        sources,
        chat_tokenizer(),
        text_column=None,
        num_sequences=count,
        sequence_length=LENGTH,
        seed=seed,
    )


def alone(folder, name, count, seed=0):
    documents = read_documents(str(folder / name))
    return token_rows(documents, chat_tokenizer(), num_sequences=count, sequence_length=LENGTH, seed=seed)


@pytest.mark.parametrize("seed", [0, 3])
def test_single_source_gives_the_rows_of_its_documents(folder, seed):
    rows_BT, (record,) = mixed(folder, "low.jsonl", 7, seed)
    assert torch.equal(rows_BT, alone(folder, "low.jsonl", 7, seed))
    assert (record.sequences, record.digest) == (7, rows_digest(rows_BT))
    assert (record.column, record.template_digest) == ("text", None)


def test_mix_holds_the_rows_of_each_source_by_weight_and_mingled(folder):
    rows_BT, records = mixed(folder, "low.jsonl=0.7, high.jsonl=0.3", 10)
    low, high = alone(folder, "low.jsonl", 7), alone(folder, "high.jsonl", 3)
    expected = collections.Counter(map(tuple, torch.cat([low, high]).tolist()))
    assert collections.Counter(map(tuple, rows_BT.tolist())) == expected
    assert not torch.equal(rows_BT, torch.cat([low, high]))
    assert [record.sequences for record in records] == [7, 3]
    assert [record.digest for record in records] == [rows_digest(low), rows_digest(high)]
    assert [record.weight for record in records] == ["0.7", "0.3"]


def test_mix_is_the_same_every_time_and_another_by_seed(folder):
    value = "low.jsonl=1, high.jsonl=1"
    digests = [rows_digest(mixed(folder, value, 10, seed)[0]) for seed in (0, 0, 1, 1, 2)]
    assert digests[0] == digests[1] != digests[2] == digests[3] != digests[4]


def test_sources_of_equal_text_are_shuffled_each_by_its_own_seed(folder):
    _, records = mixed(folder, "low.jsonl=1, low.jsonl=1", 10, seed=5)
    assert records[0].digest != records[1].digest
    _, records = mixed(folder, "low.jsonl=1, low.jsonl=1", 10)
    assert records[0].digest == records[1].digest


def test_chat_and_text_mix_and_the_record_says_which_is_which(folder):
    _, records = mixed(folder, "low.jsonl=3, chat.jsonl=1", 8)
    assert [record.column for record in records] == ["text", "messages"]
    assert records[0].template_digest is None
    assert records[1].template_digest is not None
    assert records[1].digest == rows_digest(alone(folder, "chat.jsonl", 2))


def test_too_little_text_in_one_source_names_it_and_what_it_gives(folder):
    with pytest.raises(CorpusError, match=r"chat\.jsonl: .*enough for \d:") as raised:
        mixed(folder, "low.jsonl=1, chat.jsonl=1", 20)
    assert raised.value.facts["uri"] == str(folder / "chat.jsonl")


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    num_sequences=st.integers(1, 500),
)
def test_sequences_are_shared_out_by_largest_remainder(weights, num_sequences):
    sources = [TextSource(uri=str(n), weight=f"{w / 1000:.3f}") for n, w in enumerate(weights)]
    quotas = [Fraction(num_sequences * weight, sum(weights)) for weight in weights]
    try:
        counts = shared_out(sources, num_sequences)
    except RecipeError:
        assert min(quotas) < 1
        return
    assert sum(counts) == num_sequences
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    up = [quota % 1 for count, quota in zip(counts, quotas, strict=True) if count > quota]
    down = [quota % 1 for count, quota in zip(counts, quotas, strict=True) if count <= quota]
    assert not up or not down or min(up) >= max(down, default=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jsonl", [("a.jsonl", "1")]),
        ("s3://b/year=2024", [("s3://b/year=2024", "1")]),
        ("one, two.txt", [("one, two.txt", "1")]),
        ("a.jsonl=.5,s3://b/year=2024=2", [("a.jsonl", ".5"), ("s3://b/year=2024", "2")]),
        ("a=1, b=1.5, c=2.", [("a", "1"), ("b", "1.5"), ("c", "2.")]),
    ],
)
def test_sources_are_read_from_one_text(value, expected):
    assert [(source.uri, source.weight) for source in text_sources(value)] == expected


@pytest.mark.parametrize("value", ["a.jsonl=0.7, b.jsonl", "a=1, b=0", "a=1, b=-2", "a=1,", "=1, b=1"])
def test_source_of_a_mix_without_a_weight_is_refused(value):
    with pytest.raises(RecipeError, match="has no weight above zero; write URI=WEIGHT"):
        text_sources(value)


def test_source_that_would_give_no_sequence_is_refused():
    with pytest.raises(
        RecipeError, match="b would give none of 10 calibration sequences at its weight of 1;"
    ):
        shared_out(text_sources("a=99, b=1"), 10)
