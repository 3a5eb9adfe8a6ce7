"""Calibration text as an option: one address, or a mix of several that share out the sequences by weight."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from quantlib.errors import RecipeError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_WEIGHTED = re.compile(rf"(.+)={_NUMBER}", re.DOTALL)
_BETWEEN = re.compile(r",\s*")
JOIN = ", "


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """One source of calibration text.

    Attributes:
        uri: Its address, as given.
        weight: Its share in the mix, relative to the other weights, as it was written; ``1`` of a single one.
    """

    uri: str
    weight: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """What was taken from one source of text.

    Attributes:
        uri: Its address, as given.
        weight: As in `TextSource`.
        sequences: Rows drawn from it.
        digest: sha256 of these rows.
        column: Column they come from; None of plain text.
        template_digest: sha256 of the chat template that wrote conversations out; None of plain text.
    """

    uri: str
    weight: str
    sequences: int
    digest: str
    column: str | None
    template_digest: str | None


def is_mix(value: str) -> bool:
    """Whether the option names several sources, not all of them with weights maybe."""
    parts = _BETWEEN.split(value)
    return len(parts) > 1 and any(_WEIGHTED.fullmatch(part) for part in parts)


def text_sources(value: str) -> tuple[TextSource, ...]:
    """The sources that the option ``calibration`` names.

    Args:
        value: One address, taken as it is, or ``URI=WEIGHT`` for each of several, with commas between.

    Raises:
        RecipeError: A source of several has no weight, or one of zero.

    >>> text_sources("s3://texts/year=2024")
    (TextSource(uri='s3://texts/year=2024', weight='1'),)
    >>> [source.weight for source in text_sources("a.jsonl=0.7, b.parquet=0.3")]
    ['0.7', '0.3']
    """
    if not is_mix(value):
        return (TextSource(uri=value, weight="1"),)
    sources = []
    for part in _BETWEEN.split(value):
        match = _WEIGHTED.fullmatch(part)
        if match is None or Fraction(match[2]) == 0:
            raise RecipeError(
                f"calibration names a mix, in which {part!r} has no weight above zero; write URI=WEIGHT for"
                " each of its sources, such as a.jsonl=0.7, b.parquet=0.3",
                option="calibration",
            )
        sources.append(TextSource(uri=match[1], weight=match[2]))
    return tuple(sources)


def with_addresses(value: str, changed: Callable[[str], str]) -> str:
    """The option's value with every address changed.

    >>> with_addresses("a.jsonl=0.7,b.parquet=0.3", str.upper)
    'A.JSONL=0.7, B.PARQUET=0.3'
    """
    sources = [replace(source, uri=changed(source.uri)) for source in text_sources(value)]
    if len(sources) == 1:
        return sources[0].uri
    return JOIN.join(f"{source.uri}={source.weight}" for source in sources)


def shared_out(sources: Sequence[TextSource], num_sequences: int) -> tuple[int, ...]:
    """How many sequences each source gives: by largest remainder, the first one of equals.

    Raises:
        RecipeError: A source would give none.

    >>> shared_out(text_sources("a=1, b=1, c=1"), 8)
    (3, 3, 2)
    """
    total = sum(Fraction(source.weight) for source in sources)
    quotas = [num_sequences * Fraction(source.weight) / total for source in sources]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda n: counts[n] - quotas[n])
    for n in by_remainder[: num_sequences - sum(counts)]:
        counts[n] += 1
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise RecipeError(
                f"{source.uri} would give none of {num_sequences} calibration sequences at its weight of"
                f" {source.weight}; ask for more sequences, raise its weight or leave it out",
                option="calibration",
            )
    return tuple(counts)


def described(record: Mapping[str, Any]) -> str:
    """What was taken from a source, for people, from the values of a `TextRecord`.

    >>> described({"uri": "a.jsonl", "sequences": 7, "column": "messages", "template_digest": "0f" * 32})
    '7 sequences of a.jsonl, column messages written out by the chat template 0f0f0f0f0f0f'
    """
    words = f"{record['sequences']} sequences of {record['uri']}"
    if record["column"] is not None:
        words += f", column {record['column']}"
    if record["template_digest"] is not None:
        words += f" written out by the chat template {record['template_digest'][:12]}"
    return words
