"""The control of a Llama checkpoint: the same function with other weights, in a random basis of the residual.

    python tests/benchmarks/control.py SOURCE OUTPUT [--seed 0]

A source may carry traces of what was done to it before (the demo's weights sit on a 4-bit grid), and a solver
may gain from them what it gains nowhere else. Here the norms' weights move into the linears that read them,
the head gets a matrix of its own, and all that is written to or read from the residual stream is turned by
one random orthogonal matrix. The root mean square does not change under it, so neither does the function; the
weights lie on no grid any more.

Printed: the largest difference of a logit, before and after the weights are rounded to bf16. The first is
fp32 noise; the second is what bf16 costs weights that came from bf16.

D hidden, R rows (out features), C columns (in features).
"""

import argparse
import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from quantlib.errors import UnsupportedModelError

_MAX_SHARD_SIZE = "100MB"
_CHECKED_ROWS, _CHECKED_POSITIONS = 2, 32
# What transformers writes for the control itself; everything else (the tokenizer) is copied.
_NOT_COPIED = ("*.safetensors", "*.index.json", "config.json", "generation_config.json")


def rotated_model(source: PreTrainedModel, seed: int) -> LlamaForCausalLM:
    """A new fp32 model of the same function whose norms weigh nothing and whose head is its own.

    Raises:
        UnsupportedModelError: The source is no Llama.
    """
    if not isinstance(source, LlamaForCausalLM):
        raise UnsupportedModelError(
            f"a control is made of llama models, found {source.config.model_type}: where norms and biases sit"
            " differs between families"
        )
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    control = LlamaForCausalLM(config).float().eval()
    control.load_state_dict({**source.state_dict(), "lm_head.weight": source.lm_head.weight}, strict=True)
    rotate_(control, orthogonal_basis(config.hidden_size, seed))
    return control


def orthogonal_basis(width: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix, fp64 [D, D], drawn evenly from all of them.

    QR of a Gaussian matrix; without the signs of R's diagonal the draw would depend on the QR's conventions.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis_DD, triangle_DD = torch.linalg.qr(gaussian_DD)
    return basis_DD * torch.where(triangle_DD.diagonal() < 0, -1.0, 1.0)


def rotate_(model: LlamaForCausalLM, basis_DD: torch.Tensor) -> None:
    """Turn the residual stream of an untied model: x becomes x @ basis between any two blocks.

    Numerics: products in fp64, each parameter rounded to its own dtype once.
    """
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding.double() @ basis_DD)
        blocks: Any = model.model.layers
        for block in blocks:
            attention, mlp = block.self_attn, block.mlp
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            _turn_readers_(block.input_layernorm.weight, readers, basis_DD)
            _turn_writer_(attention.o_proj, basis_DD)
            _turn_readers_(block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), basis_DD)
            _turn_writer_(mlp.down_proj, basis_DD)
        _turn_readers_(model.model.norm.weight, (model.lm_head,), basis_DD)


def _turn_readers_(norm_C: torch.Tensor, linears: Iterable[nn.Linear], basis_DD: torch.Tensor) -> None:
    """Fold a norm into the linears behind it and turn their columns; the norm keeps ones."""
    for linear in linears:
        linear.weight.copy_((linear.weight.double() * norm_C.double()) @ basis_DD)
    norm_C.fill_(1.0)


def _turn_writer_(linear: nn.Linear, basis_DD: torch.Tensor) -> None:
    """Turn the rows of a linear that adds to the residual stream."""
    linear.weight.copy_(basis_DD.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias.copy_(basis_DD.T @ linear.bias.double())


def largest_logit_difference(
    model: PreTrainedModel, other: PreTrainedModel, ids_BT: torch.Tensor
) -> tuple[float, float]:
    """Largest difference of a logit between two models, and the largest logit of the second."""
    with torch.inference_mode():
        own, others = (m(input_ids=ids_BT, use_cache=False).logits for m in (model, other))
    return (own - others).abs().max().item(), others.abs().max().item()


def write_control(source_folder: Path, output: Path, seed: int) -> dict[str, float]:
    """Make the control of a checkpoint folder, under a temporary name until it is whole.

    Returns:
        ``before_rounding`` and ``as_saved``: largest difference of a logit to the source, in fp32;
        ``largest_logit`` of the source.
    """
    source = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32).eval()
    control = rotated_model(source, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (_CHECKED_ROWS, _CHECKED_POSITIONS)
    ids_BT = torch.randint(source.config.vocab_size, shape, generator=generator)
    exact, largest = largest_logit_difference(control, source, ids_BT)
    control.bfloat16()
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source_folder, partial, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    control.save_pretrained(partial, max_shard_size=_MAX_SHARD_SIZE)
    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).eval()
    rounded, _ = largest_logit_difference(saved, source, ids_BT)
    partial.rename(output)
    return {"before_rounding": exact, "as_saved": rounded, "largest_logit": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the random basis")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it or give another folder")
    transformers_logging.disable_progress_bar()
    found = write_control(arguments.source, arguments.output, arguments.seed)
    print(f"{arguments.output}: basis of seed {arguments.seed}")
    print(
        f"largest logit difference to the source: {found['before_rounding']:.2e} before rounding to bf16,"
        f" {found['as_saved']:.2e} as saved; the source's logits reach {found['largest_logit']:.1f}"
    )


if __name__ == "__main__":
    main()
