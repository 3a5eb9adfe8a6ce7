"""The tokenizer of a GGUF file, from a Hugging Face tokenizer.

llama.cpp splits text with rules of its own before it merges bytes, and a header only names them: a wrong
name gives other tokens without a word. It is told here from the splitting rules themselves, which
tokenizer.json holds and a table names; a tokenizer with other rules is refused. (llama.cpp's own converter
goes by a hash of the tokens of a fixed text, which every other vocabulary changes.) SentencePiece's byte
pairs are told by scores instead (`quantlib.checkpoint.gguf_files.pieces`). Left out: vocabularies that are
no byte pairs.

Source: llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe: regex_exprs of each pre type; load: where merges
are ignored) and convert_hf_to_gguf.py (get_vocab_base: types of tokens).
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, SpecialVocab
from gguf.constants import TokenType

from quantlib.checkpoint.gguf_files.pieces import has_first_space, is_byte, is_of_pieces, scores_of
from quantlib.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PAIRS, _PIECES = "gpt2", "llama"
_ANY_PRE_TYPE = "default"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps of pre_tokenizer in tokenizer.json -> what llama.cpp calls them. Of a step what changes the splits:
# ByteLevel with the pattern of GPT-2 or without, digits one by one, a pattern.
_PLAIN_BYTES, _GPT2, _DIGITS = "bytes", "gpt2", "digits"
_PRE_TYPES: Mapping[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_WORDS.format(numbers=r"\p{N}"), _PLAIN_BYTES): "qwen2",
    (_WORDS.format(numbers=r"\p{N}{1,3}"), _PLAIN_BYTES): "llama-bpe",
}
# With these llama.cpp takes a word that is a token for that token, whatever merges would make of it.
_WHOLE_WORDS = ("llama-bpe",)
# Of NFC, which Qwen's tokenizers apply first, llama.cpp knows nothing: text is taken to be in that form.
_NORMALIZERS = (None, {"type": "NFC"})


def write_vocabulary(
    writer: GGUFWriter, tokenizer: "PreTrainedTokenizerBase", config: Mapping[str, Any]
) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        writer: Of the file.
        tokenizer: Of the source.
        config: The values of config.json; as many tokens are written as there are embeddings.

    Raises:
        UnsupportedModelError: It is none that llama.cpp's byte pairs give the same tokens as.
    """
    with tempfile.TemporaryDirectory(prefix="quantmill-gguf-") as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        path = Path(folder) / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        has_scores = is_of_pieces(values)
        writer.add_tokenizer_model(_PIECES if has_scores else _BYTE_PAIRS)
        writer.add_tokenizer_pre(_ANY_PRE_TYPE if has_scores else pre_type(values))
        unknown = tokenizer.unk_token
        size = int(config["vocab_size"])
        tokens, kinds = _tokens(values, size, unknown if isinstance(unknown, str) else None)
        writer.add_token_list(tokens)
        if has_scores:
            others = [text for text, kind in zip(tokens, kinds, strict=True) if kind != TokenType.NORMAL]
            scores = scores_of(values, others)
            # Characters come after all that is joined from them; no score of theirs is ever asked for.
            writer.add_token_scores([scores.get(text, -float(len(scores))) for text in tokens])
            writer.add_add_space_prefix(has_first_space(values))
        writer.add_token_types(kinds)
        special = SpecialVocab(folder, load_merges=not has_scores, n_vocab=len(tokens))
        # Unless it is told, llama.cpp decides by the pre type.
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def pre_type(values: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way a tokenizer splits text.

    Args:
        values: Of tokenizer.json.

    Raises:
        UnsupportedModelError: It is no byte-level BPE, or splits in a way that has no name here.
    """
    model = values.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(
            f"a {model.get('type')} vocabulary{' of SentencePiece' * bool(model.get('byte_fallback'))}"
        )
    if values.get("normalizer") not in _NORMALIZERS:
        raise _unknown(f"the normalizer {json.dumps(values['normalizer'])[:200]}")
    steps = tuple(_step(step) for step in _steps(values.get("pre_tokenizer")))
    if steps not in _PRE_TYPES:
        raise _unknown(f"the pre_tokenizer {json.dumps(values.get('pre_tokenizer'))[:400]}")
    found = _PRE_TYPES[steps]
    if bool(model.get("ignore_merges")) != (found in _WHOLE_WORDS):
        raise _unknown(f"ignore_merges {bool(model.get('ignore_merges'))} beside the splits of {found}")
    return found


def _steps(pre_tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(pre_tokenizer, Mapping):
        return ()
    if pre_tokenizer.get("type") == "Sequence":
        return pre_tokenizer.get("pretokenizers") or ()
    return (pre_tokenizer,)


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return _GPT2 if step.get("use_regex", True) else _PLAIN_BYTES
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(pattern)}}:
            return pattern
    return json.dumps(step)


def _tokens(values: Mapping[str, Any], size: int, unknown: str | None) -> tuple[list[str], list[int]]:
    """Text and type of every token up to the number of embeddings.

    Args:
        values: Of tokenizer.json.
        size: Embeddings.
        unknown: The token for what has none.
    """
    has_pieces = is_of_pieces(values)
    added = {token["id"]: token for token in values.get("added_tokens") or ()}
    by_id = {number: text for text, number in values["model"]["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= size:
        raise _unknown(f"{max(by_id) + 1} tokens beside {size} embeddings")
    texts, kinds = [], []
    for number in range(size):
        token = added.get(number)
        if number not in by_id:
            texts.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
            continue
        text = by_id[number]
        texts.append(text)
        if has_pieces and is_byte(text):
            kinds.append(TokenType.BYTE)
        elif has_pieces and text == unknown:
            kinds.append(TokenType.UNKNOWN)
        elif token is None:
            kinds.append(TokenType.NORMAL)
        else:
            kinds.append(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    return texts, kinds


def _unknown(found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "gguf output needs byte pairs of SentencePiece or a tokenizer that llama.cpp knows by name"
        f" ({', '.join(_PRE_TYPES.values())}), found one with {found}; choose another format"
    )
