"""The README's table of families is the table that the tests run over."""

from pathlib import Path

import pytest

from quantlib import model
from tests.support.family_settings import DENSE, EXPERTS, MULTIMODAL, REFUSED

README = (Path(model.__file__).parent / "README.md").read_text()


def _row(kind: str, names: list[str]) -> str:
    return f"| {kind} ({len(names)}) | {', '.join(sorted(names))} |"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dense", list(DENSE)),
        ("experts", list(EXPERTS)),
        ("text tower of a multimodal model", list(MULTIMODAL)),
    ],
)
def test_readme_row_lists_the_tested_families(kind: str, names: list[str]) -> None:
    assert _row(kind, names) in README


def test_readme_lists_the_refused_families_with_their_reasons() -> None:
    for family, (_, reason) in REFUSED.items():
        assert f"| {family} | {reason} |" in README
