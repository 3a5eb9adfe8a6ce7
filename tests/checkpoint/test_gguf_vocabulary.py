"""Names of splitting rules in GGUF: those of published tokenizers, and none for rules that have no name."""

import copy

import pytest

from quantlib.checkpoint.gguf_files.vocabulary import pre_type
from quantlib.errors import UnsupportedModelError

# pre_tokenizer as tokenizer.json of these models holds it.
QWEN2_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA3_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTES, "trim_offsets": False, "use_regex": False}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer(*steps, ignore_merges=False, normalizer=None):
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    model = {"type": "BPE", "ignore_merges": ignore_merges, "vocab": {}, "merges": []}
    return {"normalizer": normalizer, "pre_tokenizer": pre, "model": model}


KNOWN = {
    "gpt-2": tokenizer(BYTES),
    "smollm": tokenizer({"type": "Digits", "individual_digits": True}, BYTES),
    "qwen2": tokenizer(split(QWEN2_WORDS), PLAIN_BYTES, normalizer={"type": "NFC"}),
    "llama-bpe": tokenizer(split(LLAMA3_WORDS), PLAIN_BYTES, ignore_merges=True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rules_of_published_tokenizers_have_the_name_that_llama_cpp_gives_them(name):
    assert pre_type(KNOWN[name]) == name


def changed(name, path, value):
    values = copy.deepcopy(KNOWN[name])
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed("gpt-2", ["pre_tokenizer", "add_prefix_space"], True), "the pre_tokenizer"),
        (changed("gpt-2", ["pre_tokenizer"], None), "the pre_tokenizer null"),
        (changed("smollm", ["pre_tokenizer", "pretokenizers", 0, "individual_digits"], False), "Digits"),
        (changed("qwen2", ["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed"), "Removed"),
        (
            changed("qwen2", ["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": "x"}),
            "the pre_tokenizer",
        ),
        (changed("qwen2", ["normalizer"], {"type": "Lowercase"}), "the normalizer"),
        (changed("llama-bpe", ["model", "ignore_merges"], False), "ignore_merges False beside the splits of"),
        (changed("gpt-2", ["model", "ignore_merges"], True), "ignore_merges True"),
        (changed("gpt-2", ["model", "byte_fallback"], True), "a BPE vocabulary of SentencePiece"),
        (changed("gpt-2", ["model", "type"], "Unigram"), "a Unigram vocabulary"),
        ({}, "a None vocabulary"),
    ],
)
def test_other_rules_are_refused_by_what_they_are(values, said):
    with pytest.raises(UnsupportedModelError, match=said):
        pre_type(values)
