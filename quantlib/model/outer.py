"""The model around its blocks: embedding before them, norm and head after them.

Both ends are the model's own forward with stand-ins for the blocks, so scaling of embeddings, masks, rotary
embeddings and soft-capping of logits are transformers' own. One end may be live while the other is meta.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import CheckpointError, UnsupportedModelError
from quantlib.model.block_inputs import (
    BlockInputs,
    PreludeDone,
    Recording,
    RecordingStandIn,
    ReturningStandIn,
    StandIn,
)
from quantlib.model.materialize import copy_module


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OuterModel:
    """Live ends of a model, built by `Skeleton.build_outer`.

    Every call runs a fresh copy of the (weightless) module tree: some rotary embeddings remember the longest
    sequence they have seen, and a result must not depend on what was asked before.

    Attributes:
        dtype: Of the live weights, and of hidden states going out of `embed`.
        device: Where they are.
    """

    dtype: torch.dtype
    device: torch.device
    _model: PreTrainedModel
    _no_blocks: nn.ModuleList
    _blocks: Sequence[nn.Module]
    _num_outputs: tuple[int | None, ...]
    _missing_prelude: tuple[str, ...]
    _missing_tail: tuple[str, ...]

    def embed(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, list[BlockInputs]]:
        """The input of block 0, and what every block is called with besides its hidden state.

        Rows are unpadded and causal.

        Args:
            ids_BT: Token ids, integer [B, T].

        Returns:
            Hidden state [B, T, D] and one BlockInputs a block, valid for batches of this shape.

        Raises:
            CheckpointError: The outer model was built without the prelude tensors.
        """
        _refuse_missing("embed", "prelude_tensors", self._missing_prelude)
        recording = Recording()
        last = len(self._blocks) - 1
        stand_ins = [
            RecordingStandIn(block, num_outputs, recording, is_last=index == last)
            for index, (block, num_outputs) in enumerate(zip(self._blocks, self._num_outputs, strict=True))
        ]
        model = self._with_blocks(stand_ins)
        try:
            with torch.no_grad():
                model(input_ids=ids_BT.to(self.device).long(), use_cache=False, return_dict=True)
        except PreludeDone:
            pass
        if recording.hidden is None or len(recording.inputs) != len(self._blocks):
            raise UnsupportedModelError("the model's forward did not reach every decoder block")
        return recording.hidden, recording.inputs

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The model's logits for the output of the last block.

        Works position by position: a slice [b, t, D] of any rows and positions gives their logits.

        Shapes:
            hidden_BTD: floating [B, T, D].

        Returns:
            fp32 [B, T, V].

        Raises:
            CheckpointError: The outer model was built without the tail tensors.

        Numerics: norm, head and soft-capping in ``self.dtype``, then cast to fp32.
        """
        _refuse_missing("logits", "tail_tensors", self._missing_tail)
        # Every position as a sequence of its own: no embedding is looked up, and the masks and rotary
        # embeddings that the forward makes on its way, which nothing reads here, stay small.
        hidden_N1D = hidden_BTD.to(device=self.device, dtype=self.dtype).flatten(0, 1).unsqueeze(1)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        with torch.no_grad():
            logits_N1V = self.run_tail(hidden_N1D, zero)
        return logits_N1V.float().unflatten(0, hidden_BTD.shape[:2]).squeeze(2)

    def run_tail(self, hidden_N1D: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1, V] for the output [N, 1, D] of the last block; a scalar stands in for embeddings."""
        stand_ins: list[StandIn] = [
            StandIn(block, num_outputs)
            for block, num_outputs in zip(self._blocks[:-1], self._num_outputs[:-1], strict=True)
        ]
        stand_ins.append(ReturningStandIn(self._blocks[-1], self._num_outputs[-1], hidden_N1D))
        model = self._with_blocks(stand_ins)
        self._fill_with_zeros_(model)
        width = getattr(model.get_input_embeddings(), "embedding_dim", hidden_N1D.shape[-1])
        # Contiguous: some models scale their embeddings in place.
        embedded_N1D = embedded.expand(len(hidden_N1D), 1, width).contiguous()
        return model(inputs_embeds=embedded_N1D, use_cache=False, return_dict=True).logits

    def _fill_with_zeros_(self, model: nn.Module) -> None:
        """For what runs on the way to the blocks (positions are embedded there): zeros without memory."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)

    def _with_blocks(self, stand_ins: Sequence[nn.Module]) -> PreTrainedModel:
        return copy_module(self._model, {id(self._no_blocks): nn.ModuleList(stand_ins)})


def _refuse_missing(method: str, wanted: str, missing: tuple[str, ...]) -> None:
    if missing:
        raise CheckpointError(
            f"{method} needs tensor {missing[0]}, which build_outer was not given;"
            f" build the outer model with the skeleton's {wanted}",
            tensor=missing[0],
        )
