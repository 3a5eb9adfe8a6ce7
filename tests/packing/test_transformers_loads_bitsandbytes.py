"""Outputs of tiny models as transformers loads them, with bitsandbytes on a CPU."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from quantlib.checkpoint.reader import read_tensors
from quantlib.checkpoint.source import open_source
from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.inprocess import quantize
from quantlib.storage import open_store
from tests.support.tiny_jobs import tiny_options, tiny_source

INT8 = {"scheme": "W8A16", "group_size": -1}


def convert(tmp_path, family, settings, **options):
    tiny_source(tmp_path / "source", family, **settings)
    made = tiny_options(
        tmp_path, target="bitsandbytes", method="rtn", calibration=None, evaluation=None, **options
    )
    quantize(made)
    return tmp_path / "output"


def loaded(folder):
    # In the dtype of the file: weights that are kept stay in it whatever is asked for.
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, device_map="cpu"
    )
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert not notes["mismatched_keys"]
    return model.eval()


def levels(folder):
    store, uri = open_store("file:///"), f"file://{folder}"
    checkpoint = open_source(store, uri, levels_dtype="F32")
    return read_tensors(store, checkpoint, list(checkpoint.tensors))


# GPT-2 has Conv1D in place of linears, stored the other way round.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kept"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
def test_rows_are_loaded_to_their_levels_and_kept_linears_as_they_were(tmp_path, family, kept):
    name = kept if family == "llama" else kept.removeprefix("transformer.")
    folder = convert(tmp_path, family, {}, **INT8, rules=({"match": f"*{name}", "keep": True},))
    model, stored = loaded(folder), levels(folder)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Linear8bitLt)}
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(modules) == {"llama": 3 * 7 - 1, "gpt2": 3 * 4 - 1}[family]
    assert kept not in modules
    assert any(kept.endswith(entry) for entry in block["llm_int8_skip_modules"])
    for found, module in modules.items():
        weight = next(
            stored[n] for n in (f"{found}.weight", f"{found.partition('.')[2]}.weight") if n in stored
        )
        made = dequantize_bnb_weight(module.weight, module.state)
        torch.testing.assert_close(made, weight, rtol=3e-7, atol=0)
    assert model(torch.arange(24)[None]).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["NF4", "NF4_DQ", "FP4", "FP4_DQ"])
def test_blocks_are_loaded_to_their_levels_and_kept_linears_as_they_were(tmp_path, scheme):
    kept = "model.layers.1.mlp.down_proj"
    rules = ({"match": kept, "keep": True},)
    folder = convert(
        tmp_path, "llama", {"intermediate_size": 128}, scheme=scheme, group_size=None, rules=rules
    )
    verified = verify_checkpoint(open_store("file:///"), f"file://{folder}", f"file://{tmp_path}/source")
    assert verified.findings == ()
    model, stored = loaded(folder), levels(folder)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(modules) == 3 * 7 - 1
    assert kept not in modules
    for name, module in modules.items():
        state = module.weight.quant_state
        # What the source was, which its levels are rounded to.
        assert state.dtype == torch.bfloat16
        assert torch.equal(dequantize_bnb_weight(module.weight), stored[f"{name}.weight"].bfloat16())
    ids = torch.arange(24)[None]
    found = model(ids).logits
    for name, module in modules.items():
        made = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.bfloat16)
        made.weight.data = stored[f"{name}.weight"].bfloat16()
        model.set_submodule(name, made)
    torch.testing.assert_close(found, model(ids).logits, rtol=0.05, atol=0.05)
