"""Environments of the tools that Quantmill is compared with: one each, made on first use, versions pinned.

Their wishes for torch and transformers contradict ours and each other's, so nothing is shared.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A tool to compare with.

    Attributes:
        driver: Script that runs inside the environment.
        method: What it does, for the table.
        requirements: Pins for pip; torch and transformers are the newest the tool allows, or ours.
        fewest_workers: Variable of the environment -> least worker threads the tool can do with.
    """

    driver: Path
    method: str
    requirements: tuple[str, ...]
    fewest_workers: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The pin of the tool itself, which comes last."""
        return self.requirements[-1].partition("==")[2]


PEERS = {
    "llm-compressor": Peer(
        driver=_HERE / "peer_llmcompressor.py",
        method="GPTQ, static activation order, damp 0.01",
        requirements=("torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1"),
    ),
    "gptqmodel": Peer(
        driver=_HERE / "peer_gptqmodel.py",
        method="GPTQ, group-aware order, damp 0.05",
        requirements=("torch==2.15.0", "transformers==5.23.0", "gptqmodel==7.7.0"),
        # Its loader wants two of them; on two cores it makes one by default and ends in a ValueError.
        fewest_workers={"GPTQMODEL_CPU_WORKERS": 2},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a peer's Python is, or why there is none."""

    python: Path
    failure: str | None = None


def make_environment(name: str, requirements: tuple[str, ...], folder: Path) -> Environment:
    """An environment with just these packages; made or completed unless it is there.

    Args:
        name: Of the folder below ``folder``.
        requirements: For pip, which looks where it is configured to look.
        folder: Where environments are kept.
    """
    root = folder.absolute() / name
    python, stamp, wanted = root / "bin" / "python", root / "requirements.txt", "\n".join(requirements) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return Environment(python=python)
    print(f"{name}: making {root} (gigabytes to fetch the first time)", flush=True)
    commands = (
        [sys.executable, "-m", "venv", str(root)],
        [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements],
    )
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return Environment(python=python, failure=f"not installed: {error}")
        if done.returncode != 0:
            return Environment(
                python=python, failure=f"not installed: {_last_error(done.stderr + done.stdout)}"
            )
    stamp.write_text(wanted)
    return Environment(python=python)


def _last_error(output: str) -> str:
    """The line that tells most of what pip or venv printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no word of why"])[-1][:300]
