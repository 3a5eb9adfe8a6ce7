"""Control and biased copy are functions of their source; the evaluation's loss is that of transformers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlib.errors import UnsupportedModelError
from tests.benchmarks.biased import write_biased
from tests.benchmarks.control import orthogonal_basis, rotated_model, write_control
from tests.benchmarks.dense_evaluation import evaluate
from tests.support.tiny_jobs import tiny_source
from tests.support.tiny_models import read_all_tensors, read_config, tiny_config, tiny_model


def some_ids(rows: int, positions: int) -> torch.Tensor:
    return torch.randint(96, (rows, positions), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "overrides",
    [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["tied", "biases"],
)
def test_control_of_tiny_llama_has_same_logits_and_other_weights(overrides):
    source = tiny_model(tiny_config("llama", **overrides))
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    control = rotated_model(source, seed=1)
    ids_BT = some_ids(2, 20)
    with torch.inference_mode():
        expected, found = source(input_ids=ids_BT).logits, control(input_ids=ids_BT).logits
    # fp32 noise of two ways of summing; logits are of the order of 1.
    assert (found - expected).abs().max() < 1e-4
    for name, tensor in control.state_dict().items():
        is_norm = "norm" in name
        assert torch.equal(tensor, torch.ones_like(tensor)) == is_norm, name
        # Biases of linears that write elsewhere than to the residual stay.
        stays = name.endswith("bias") and "o_proj" not in name and "down_proj" not in name
        assert torch.equal(tensor, before[name]) == stays, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_basis_is_orthogonal_and_that_of_its_seed():
    basis_DD = orthogonal_basis(24, seed=5)
    assert torch.allclose(basis_DD @ basis_DD.T, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert torch.equal(basis_DD, orthogonal_basis(24, seed=5))
    assert not torch.allclose(basis_DD, orthogonal_basis(24, seed=6))


def test_written_control_is_untied_bf16_with_tokenizer(tmp_path):
    source_folder = tiny_source(tmp_path / "source", tie_word_embeddings=True)
    found = write_control(source_folder, tmp_path / "control", seed=0)
    assert found["before_rounding"] < 1e-4 < found["as_saved"] < 0.1 * found["largest_logit"]
    config = read_config(tmp_path / "control")
    assert config["tie_word_embeddings"] is False and config["dtype"] == "bfloat16"
    tensors = read_all_tensors(tmp_path / "control")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "control" / name).read_bytes() == (source_folder / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "control").config.model_type == "llama"


def test_control_of_other_family_is_refused():
    with pytest.raises(UnsupportedModelError, match="qwen3"):
        rotated_model(tiny_model(tiny_config("qwen3")), seed=0)


@pytest.mark.parametrize("rows_at_once", [1, 2, 8])
def test_dense_loss_equals_loss_of_transformers(rows_at_once, monkeypatch):
    # Slices of 7 predictions: they end inside rows.
    monkeypatch.setattr("tests.benchmarks.dense_evaluation._LOGITS_BYTES", 7 * 4 * 96)
    model = tiny_model(tiny_config("llama"))
    ids_BT = some_ids(5, 20)
    found = evaluate(model, ids_BT.int(), rows_at_once=rows_at_once)
    with torch.inference_mode():
        expected = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids_BT]
    assert found.row_losses == pytest.approx(expected, rel=1e-6)
    assert found.mean_loss == pytest.approx(sum(expected) / 5, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)


def test_dense_loss_of_soft_capped_logits_is_refused():
    with pytest.raises(UnsupportedModelError, match="gemma2"):
        evaluate(tiny_model(tiny_config("gemma2")), some_ids(1, 8))


def test_biased_copy_is_the_same_function_with_a_bias_in_every_linear(tmp_path):
    source = tiny_source(tmp_path / "source")
    assert write_biased(source, tmp_path / "biased") == 21
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (source, tmp_path / "biased")
    )
    linears = [m for n, m in second.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert all(linear.bias is not None and not linear.bias.any() for linear in linears)
    ids_BT = some_ids(2, 20)
    with torch.inference_mode():
        assert torch.equal(first(input_ids=ids_BT).logits, second(input_ids=ids_BT).logits)
