"""The README's table of options is the table of options, and its files exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from quantlib.job.command_line import COMMANDS
from quantlib.job.options import option_fields
from tests.support.family_settings import FAMILY_SETTINGS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


def option_row(name: str) -> str:
    """The table row of one option; SOURCE and OUTPUT are positional, rules live in recipes."""
    found, option = option_fields()[name]
    flag = {"source": "SOURCE", "output": "OUTPUT", "rules": "[[rules]]"}.get(
        name, f"--{name.replace('_', '-')}"
    )
    default = "" if found.default in (dataclasses.MISSING, None, ()) else f"`{found.default}`"
    one = "One or several" if option.several else "One"
    choices = f" {one} of {', '.join(f'`{c}`' for c in option.choices)}." if option.choices else ""
    return f"| `{flag}` | {default} | {option.help}{choices} |"


@pytest.mark.parametrize("name", option_fields())
def test_readme_option_row_says_what_the_program_does(name):
    assert option_row(name) in README


@pytest.mark.parametrize("name", [*COMMANDS, "serve"])
def test_readme_names_every_command(name):
    assert f"`quantmill {name}" in README


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_readme_link_leads_somewhere(path):
    assert (REPOSITORY / path).exists()


def test_readme_names_as_many_families_as_are_compared():
    row = next(line for line in README.splitlines() if line.startswith("| models |"))
    assert f"; {len(FAMILY_SETTINGS)} families are [compared with transformers]" in row
