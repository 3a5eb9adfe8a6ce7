"""What stands at the top of the repository, and what the text of the code is made of."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {"flows", "workers", "quantlib", "tests", "infra", "pyproject.toml", "README.md"}
CODE = ("flows", "workers", "quantlib", "tests", "infra")
VAGUE_NAMES = {"utils", "helpers", "base", "common", "misc"}


def files_of_the_project() -> list[Path]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def python_files() -> list[Path]:
    return sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def test_top_level_holds_nothing_else():
    found = {path.parts[0] for path in files_of_the_project()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_code_is_ascii():
    found = {str(path.relative_to(ROOT)) for path in python_files() if not path.read_bytes().isascii()}
    assert not found


def test_no_file_has_a_name_that_says_nothing():
    assert not {path for path in python_files() if path.stem in VAGUE_NAMES}


def test_test_files_have_unique_names():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
