"""What a GGUF file says of SentencePiece's byte pairs, from tokenizer.json: scores, and the first space.

SentencePiece joins, of all neighbours that make a piece, those whose piece has the highest score; so does
llama.cpp. tokenizer.json has pairs in order instead, made from the pieces: those of a piece stand together
and are all ways to cut it in two. Where that holds, the place of its pairs is a score that gives the same
tokens; any other list of pairs is refused. Left out: Unigram models, which llama.cpp calls t5.

Two things remain that llama.cpp does otherwise than transformers: it puts a space before text that begins
with one, too, which transformers' Metaspace does not; and of several ways to cut one piece it joins the
leftmost pair, where transformers goes by their order.

Source: llama.cpp, src/llama-vocab.cpp (llm_tokenizer_spm_session; load: add_space_prefix); transformers,
convert_slow_tokenizer.py (generate_merges).
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from quantlib.errors import UnsupportedModelError

_SPACE = "\u2581"
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
# Prepend schemes of Metaspace -> whether text gets a first space.
_SCHEMES = {"first": True, "always": True, "never": False}
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def is_of_pieces(values: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json holds byte pairs of SentencePiece: what has no piece is spelt in bytes."""
    model = values.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def is_byte(text: str) -> bool:
    """Whether a token stands for a byte.

    >>> is_byte("<0x0A>"), is_byte("<s>")
    (True, False)
    """
    return text in _BYTES


def has_first_space(values: Mapping[str, Any]) -> bool:
    """Whether text is tokenized as if a space came before it.

    Args:
        values: Of tokenizer.json.

    Raises:
        UnsupportedModelError: Its normalizer or pre_tokenizer does anything else than to mark spaces.
    """
    normalizer, splits = values.get("normalizer"), values.get("pre_tokenizer")
    match normalizer:
        case {"type": "Sequence", "normalizers": list(steps)}:
            pass
        case _:
            steps = [normalizer]
    if splits is None and steps in ([_ESCAPE], [_PREPEND, _ESCAPE]):
        return _PREPEND in steps
    if normalizer is None:
        match splits:
            case {"type": "Metaspace", "split": False, "replacement": mark, "prepend_scheme": str(scheme)}:
                if mark == _SPACE:
                    return _SCHEMES[scheme]
    raise _unknown(f"the normalizer {str(normalizer)[:200]} and the pre_tokenizer {str(splits)[:200]}")


def scores_of(values: Mapping[str, Any], others: Collection[str]) -> dict[str, float]:
    """The score of every piece that is joined from others: 0 of the first, lower of those that follow.

    Args:
        values: Of tokenizer.json.
        others: Tokens that are no pieces: special ones and what a user added.

    Raises:
        UnsupportedModelError: A byte has no token, or the pairs are not those of the pieces.
    """
    model = values["model"]
    tokens = model["vocab"]
    lacking = next((byte for byte in _BYTES if byte not in tokens), None)
    if lacking is not None:
        raise _unknown(f"no token {lacking}")
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    scores: dict[str, float] = {}
    last = None
    for left, right in pairs:
        piece = left + right
        if piece != last and piece in scores:
            raise _unknown(f"pairs of the piece {piece!r} that do not stand together")
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    known = set(pairs)
    for piece in tokens.keys() - set(others) - set(_BYTES):
        for pair in _cuts(piece, tokens):
            if pair not in known:
                raise _unknown(f"no pair {pair} for the piece {piece!r}")
    return scores


def _cuts(piece: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Ways to join it from two symbols: tokens or single characters."""
    for place in range(1, len(piece)):
        pair = (piece[:place], piece[place:])
        if all(len(part) == 1 or part in tokens for part in pair):
            yield pair


def _unknown(found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "gguf output needs SentencePiece byte pairs that follow from its pieces, found a tokenizer with"
        f" {found}; choose another format"
    )
