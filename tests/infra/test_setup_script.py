"""infra/setup: what it installs, in which order, when it has nothing to do, and what it says when it cannot.

Python and pip are stand-ins that write down how they were called: the real ones would take minutes and a
package registry.
"""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "env", "cat", "cut", "dirname", "paste", "sha256sum", "sort", "cp", "mkdir", "ln")

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *"pip install"*"$FAIL_ON"*) [[ -z "$FAIL_ON" ]] || exit 1 ;;
esac
"""


class Checkout:
    """A folder with the script and what it reads, and a PATH with little more than a stand-in Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        (self.root / "infra").mkdir(parents=True)
        for name in ("infra/setup", "infra/constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.path = folder / "bin"
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))
        self._calls = folder / "calls"

    def add_python(self, name: str, script: str = STAND_IN) -> None:
        python = self.path / name
        python.write_text(script)
        python.chmod(0o755)

    def setup(self, *extras: str, fail_on: str = "") -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.path), "CALLS": str(self._calls), "FAIL_ON": fail_on}
        return subprocess.run(
            [shutil.which("bash"), str(self.root / "infra/setup"), *extras],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[str]:
        """What pip was asked for since the last look, without the common options."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return [line.rpartition("constraints.txt ")[2] for line in lines if "pip install" in line]


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    made.add_python("python3.11")
    return made


def test_torch_comes_first_then_the_project_with_its_extras(checkout):
    done = checkout.setup("bench")
    assert done.returncode == 0, done.stderr
    assert checkout.installs() == ["torch==2.13.0", f"-e {checkout.root}[bench]"]
    assert all(line.startswith("setup: ") for line in done.stdout.splitlines())


def test_second_start_does_nothing(checkout):
    checkout.setup("dev")
    checkout.installs()
    done = checkout.setup("dev")
    assert (done.returncode, done.stdout, checkout.installs()) == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "infra/constraints.txt"])
def test_changed_requirements_are_installed(checkout, name):
    checkout.setup("dev")
    checkout.installs()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.setup("dev")
    assert len(checkout.installs()) == 2


def test_other_extras_are_installed(checkout):
    checkout.setup("bench")
    checkout.installs()
    checkout.setup("dev")
    assert checkout.installs()[1].endswith("[dev]")


def test_interrupted_install_is_not_taken_for_a_finished_one(checkout):
    assert checkout.setup("dev", fail_on="[dev]").returncode != 0
    checkout.installs()
    assert checkout.setup("dev").returncode == 0
    assert len(checkout.installs()) == 2


def test_missing_python_is_said(tmp_path):
    done = Checkout(tmp_path).setup("dev")
    assert done.returncode == 2
    assert "wanted Python 3.11 or 3.12" in done.stderr


def test_unsupported_python_is_not_taken(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.add_python("python3", "#!/usr/bin/env bash\nexit 1\n")
    assert checkout.setup("dev").returncode == 2


def test_python_without_venv_is_said(tmp_path):
    checkout = Checkout(tmp_path)
    script = '#!/usr/bin/env bash\n[[ "$*" != *ensurepip* ]]\n'
    checkout.add_python("python3.11", script)
    done = checkout.setup("dev")
    assert done.returncode == 2
    assert "cannot make virtual environments" in done.stderr


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


@pytest.mark.parametrize("wanted", requirements(), ids=str)
def test_every_requirement_has_a_version_in_the_constraints(wanted):
    lines = (ROOT / "infra/constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    if wanted.name == "quantmill":
        return
    assert pinned.get(wanted.name.lower()) in wanted.specifier


def test_scripts_are_executable():
    for name in ("infra/setup", "infra/demo", "infra/test", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
