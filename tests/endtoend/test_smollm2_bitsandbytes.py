"""SmolLM2-135M in the layouts of bitsandbytes: transformers runs what was written, as evaluated here."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlib.calibration.corpus import rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.evaluation import evaluate_checkpoint
from quantlib.inprocess import quantize
from quantlib.job.options import options_from

DEMO = Path(__file__).resolve().parents[2] / ".demo"
SOURCE = DEMO / "source" / "SmolLM2-135M-Instruct"
TEXT = str(DEMO / "text" / "evaluation.jsonl")
ROWS = {"sequences": 8, "sequence_length": 256}

pytestmark = pytest.mark.slow


def perplexity_in_transformers(output: str, digest: str) -> float:
    rows_BT = token_rows(
        read_documents(TEXT),
        AutoTokenizer.from_pretrained(output),
        num_sequences=ROWS["sequences"],
        sequence_length=ROWS["sequence_length"],
        seed=0,
    )
    assert rows_digest(rows_BT) == digest
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16, device_map="cpu").eval()
    assert model.is_quantized
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for row in rows_BT.long():
            logits = model(row[None]).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            tokens += len(row) - 1
    return math.exp(loss / tokens)


@pytest.mark.parametrize(("scheme", "group_size"), [("W8A16", -1), ("NF4_DQ", None)])
def test_transformers_has_the_perplexity_that_is_evaluated(tmp_path, scheme, group_size):
    output = str(tmp_path / "output")
    options = {"source": str(SOURCE), "output": output, "target": "bitsandbytes", "method": "rtn"}
    quantize(options_from({**options, "scheme": scheme, "group_size": group_size}))
    measured = evaluate_checkpoint(output, TEXT, text_column="text", **ROWS)
    found = perplexity_in_transformers(output, measured["digest"])
    assert found == pytest.approx(measured["perplexity"], rel=0.01)
