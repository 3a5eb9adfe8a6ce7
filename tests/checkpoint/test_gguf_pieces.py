"""SentencePiece in GGUF: scores are those of SentencePiece's own model, and other pairs are refused."""

import copy
import json

import gguf
import pytest
import sentencepiece
from gguf import TokenType
from transformers import AutoTokenizer

from quantlib.checkpoint.gguf_files.pieces import has_first_space, is_of_pieces, scores_of
from quantlib.checkpoint.gguf_files.vocabulary import write_vocabulary
from quantlib.errors import UnsupportedModelError
from tests.support.tiny_pieces import PIECES, save_piece_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def metaspace(scheme, **changes):
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False, **changes}


def steps(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    model = sentencepiece.SentencePieceProcessor(model_proto=save_piece_tokenizer(folder))
    return folder, model, json.loads((folder / "tokenizer.json").read_text())


def fields_of(folder, trained_folder, **config):
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    write_vocabulary(writer, tokenizer, {"model_type": "llama", "vocab_size": PIECES + 2, **config})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_tokens_types_and_scores_are_those_of_the_model_that_was_trained(trained, tmp_path):
    folder, model, values = trained
    fields = fields_of(tmp_path, folder)
    pieces = range(model.vocab_size())
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"][:PIECES] == [model.id_to_piece(number) for number in pieces]
    kinds = dict.fromkeys(pieces, TokenType.NORMAL)
    kinds |= {number: TokenType.BYTE for number in pieces if model.is_byte(number)}
    kinds |= {number: TokenType.CONTROL for number in pieces if model.is_control(number)}
    kinds |= {number: TokenType.UNKNOWN for number in pieces if model.is_unknown(number)}
    found = fields["tokenizer.ggml.token_type"]
    assert found == [*(kinds[number] for number in pieces), *[TokenType.UNUSED] * 2]
    joined = [n for n in pieces if kinds[n] == TokenType.NORMAL and len(model.id_to_piece(n)) > 1]
    assert len(joined) > 30
    for number in joined:
        assert fields["tokenizer.ggml.scores"][number] == model.get_score(number), model.id_to_piece(number)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.unknown_token_id"]) == (1, 0)
    assert "tokenizer.ggml.merges" not in fields


def test_only_byte_pairs_with_bytes_are_of_pieces(trained):
    values = trained[2]
    assert is_of_pieces(values)
    assert not is_of_pieces({"model": {**values["model"], "byte_fallback": False}})
    assert not is_of_pieces({"model": {"type": "Unigram", "byte_fallback": True}})
    assert not is_of_pieces({})


@pytest.mark.parametrize(
    ("normalizer", "splits", "expected"),
    [
        (steps(PREPEND, ESCAPE), None, True),
        (steps(ESCAPE), None, False),
        (ESCAPE, None, False),
        (None, metaspace("first"), True),
        (None, metaspace("always"), True),
        (None, metaspace("never"), False),
    ],
)
def test_first_space_is_told_from_either_way_to_mark_spaces(normalizer, splits, expected):
    assert has_first_space({"normalizer": normalizer, "pre_tokenizer": splits}) is expected


@pytest.mark.parametrize(
    ("normalizer", "splits"),
    [
        (None, None),
        (steps(ESCAPE, PREPEND), None),
        (steps({"type": "NFKC"}, PREPEND, ESCAPE), None),
        (steps(PREPEND, ESCAPE), metaspace("first")),
        (None, metaspace("first", split=True)),
        (None, metaspace("first", replacement="_")),
        (None, {"type": "ByteLevel"}),
    ],
)
def test_other_ways_to_mark_spaces_are_refused(normalizer, splits):
    with pytest.raises(UnsupportedModelError, match="a tokenizer with the normalizer"):
        has_first_space({"normalizer": normalizer, "pre_tokenizer": splits})


def test_pairs_written_as_text_are_the_same(trained):
    values = trained[2]
    other = copy.deepcopy(values)
    other["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
    assert scores_of(other, SPECIAL) == scores_of(values, SPECIAL)


def without_a_byte(model):
    del model["vocab"]["<0x0A>"]


def without_a_pair(model):
    model["merges"].pop()


def with_a_piece_of_no_character(model):
    # llama.cpp would join it from the character that has no token and the rest.
    model["vocab"]["\u00e9w"] = len(model["vocab"])


def with_scattered_pairs(model):
    model["vocab"] |= {text: len(model["vocab"]) + n for n, text in enumerate(("qx", "xz", "qxz"))}
    model["merges"] += [["q", "xz"], ["q", "x"], ["qx", "z"], ["x", "z"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_byte, "no token <0x0A>"),
        (without_a_pair, "no pair"),
        (with_a_piece_of_no_character, "for the piece '\u00e9w'"),
        (with_scattered_pairs, "that do not stand together"),
    ],
)
def test_pairs_that_do_not_follow_from_pieces_are_refused(trained, change, said):
    values = copy.deepcopy(trained[2])
    change(values["model"])
    with pytest.raises(UnsupportedModelError, match=said):
        scores_of(values, SPECIAL)
