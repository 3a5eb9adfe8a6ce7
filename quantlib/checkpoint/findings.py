"""Faults of a checkpoint as sentences: as many as a person reads."""

from collections.abc import Iterable, Iterator

_MAX_NAMED = 20


def limited(sentences: Iterable[str]) -> Iterator[str]:
    """At most `_MAX_NAMED` of a kind, then how many more there are."""
    more = 0
    for count, sentence in enumerate(sentences):
        if count < _MAX_NAMED:
            yield sentence
        else:
            more += 1
    if more:
        yield f"{more} more findings of this kind are left out."
