"""Whether a model still behaves when stand-ins take its blocks' places, found out before any weight is read.

A model may need its blocks to get through its own forward, or hand on what they return beside the hidden
state. Run block by block it would go wrong, so the calls of stand-ins are compared with those of the blocks.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import UnsupportedModelError
from quantlib.model.materialize import copy_module
from quantlib.model.outer import OuterModel
from quantlib.model.trace import TRACED_SHAPE, ModelTrace, form_of, refusing


def refuse_unlike_trace(model: PreTrainedModel, blocks_path: str, trace: ModelTrace) -> None:
    """Run both ends of the meta model as `OuterModel` does, and compare.

    Raises:
        UnsupportedModelError: An end does not run without the blocks, or a block would be called with other
            arguments than in the model itself.
    """
    blocks, no_blocks = model.get_submodule(blocks_path), nn.ModuleList()
    outer = OuterModel(
        dtype=torch.float32,
        device=torch.device("meta"),
        _model=copy_module(model, {id(blocks): no_blocks}),
        _no_blocks=no_blocks,
        _blocks=tuple(blocks.children()),
        _num_outputs=tuple(block.num_outputs for block in trace.blocks),
        _missing_prelude=(),
        _missing_tail=(),
    )
    with refusing(model, "run without its blocks"):
        hidden_BTD, inputs = outer.embed(torch.zeros(TRACED_SHAPE, dtype=torch.long, device="meta"))
        outer.logits(hidden_BTD)
        # Not for gradients: requires_grad marks what is computed from the embeddings.
        with torch.enable_grad():
            embedded = torch.zeros((), device="meta").requires_grad_()
            logits_N1V = outer.run_tail(hidden_BTD.flatten(0, 1).unsqueeze(1), embedded.clone())
    if logits_N1V.requires_grad:
        raise UnsupportedModelError(
            f"{model.config.model_type}: what follows the last decoder block reads the embeddings as well;"
            " the model cannot be run block by block",
            model_type=model.config.model_type,
        )
    for index, (found, block) in enumerate(zip(inputs, trace.blocks, strict=True)):
        if form_of((found.args, found.kwargs)) != block.inputs:
            raise UnsupportedModelError(
                f"{model.config.model_type}: decoder block {index} is handed something that an earlier block"
                " made; blocks cannot be run one by one",
                model_type=model.config.model_type,
            )
