"""infra/demo hands its options on, reuses or removes an earlier output, and leaves no server behind.

The programs it calls are stand-ins that write down their arguments; the conversion itself has its own tests.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

QUANTMILL = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$ARGUMENTS"
[[ "$QUANTMILL_FAILS" == no ]] || exit 1
mkdir -p "$3"
"""


class Demo:
    """A checkout with the real infra/demo and stand-ins for what it calls."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self._arguments = folder / "arguments"
        (self.root / "infra").mkdir(parents=True)
        (self.root / ".venv/bin").mkdir(parents=True)
        shutil.copy(ROOT / "infra/demo", self.root / "infra/demo")
        self._executable("infra/setup", "#!/usr/bin/env bash\n")
        self._executable(".venv/bin/quantmill", QUANTMILL)
        self._executable(".venv/bin/python", "#!/usr/bin/env bash\n")
        self._environment = os.environ | {"ARGUMENTS": str(self._arguments)}

    def _executable(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        (self.root / name).chmod(0o755)

    def run(self, *options: str, fails: bool = False) -> subprocess.CompletedProcess:
        self._arguments.unlink(missing_ok=True)
        return subprocess.run(
            [str(self.root / "infra/demo"), *options],
            env=self._environment | {"QUANTMILL_FAILS": "yes" if fails else "no"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def arguments(self) -> list[str]:
        return self._arguments.read_text().splitlines()

    def output(self, name: str) -> Path:
        return self.root / ".demo/output" / name


@pytest.fixture
def demo(tmp_path):
    return Demo(tmp_path)


def test_demo_converts_with_the_stated_settings_and_ends_with_the_addresses(demo):
    done = demo.run()
    assert done.returncode == 0, done.stderr
    command, source, output, *options = demo.arguments()
    assert command == "quantize"
    assert source == str(demo.root / ".demo/source/SmolLM2-135M-Instruct")
    assert output == str(demo.output("SmolLM2-135M-Instruct-W4A16"))
    settings = dict(zip(options[::2], options[1::2], strict=True))
    assert settings["--scheme"] == "W4A16"
    assert settings["--group-size"] == settings["--sequences"] == "64"
    assert settings["--sequence-length"] == "512"
    assert settings["--evaluation"] == str(demo.root / ".demo/text/evaluation.jsonl")
    assert f"checkpoint  {output}" in done.stdout
    assert f"report      {output}/quantmill_report.html" in done.stdout


@pytest.mark.parametrize("given", [("--format", "gptq"), ("--format=gptq",)])
def test_another_format_goes_to_another_output(demo, given):
    assert demo.run(*given, "--workers", "2").returncode == 0
    arguments = demo.arguments()
    assert arguments[2] == str(demo.output("SmolLM2-135M-Instruct-W4A16-gptq"))
    assert arguments[arguments.index("--format") + 1] == "gptq"
    assert arguments[-2:] == ["--workers", "2"]


def test_earlier_output_stays_unless_again_is_asked_for(demo):
    demo.run()
    kept = demo.output("SmolLM2-135M-Instruct-W4A16") / "kept"
    work = demo.output("SmolLM2-135M-Instruct-W4A16.quantmill")
    kept.touch()
    work.mkdir()
    demo.run()
    assert kept.exists() and work.exists()
    demo.run("--again")
    assert not kept.exists() and not work.exists()


def test_failed_conversion_fails_the_demo(demo):
    done = demo.run(fails=True)
    assert done.returncode == 1
    assert "perplexity" not in done.stdout.lower()


def test_help_starts_nothing(demo):
    done = demo.run("--help")
    assert done.returncode == 0
    assert "--s3" in done.stdout
    with pytest.raises(FileNotFoundError):
        demo.arguments()
