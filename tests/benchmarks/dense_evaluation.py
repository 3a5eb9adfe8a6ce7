"""Loss of a plain transformers model on rows of tokens: the one evaluation that all variants go through.

It knows nothing of cells, streams or file formats, so a mistake there cannot hide here: a model comes in, its
own forward runs, the next token's loss inside each row comes out. Left out: padding, and divergence from
another model.

B sequences, T positions, D hidden, V vocabulary, N predictions of a slice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from quantlib.errors import UnsupportedModelError

_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLoss:
    """Mean loss of every row, in nats; rows are equally long, so their mean is that of all predictions."""

    row_losses: tuple[float, ...]

    @property
    def mean_loss(self) -> float:
        """Nats a predicted token."""
        return math.fsum(self.row_losses) / len(self.row_losses)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.mean_loss)


def evaluate(model: PreTrainedModel, ids_BT: torch.Tensor, *, rows_at_once: int = 4) -> DenseLoss:
    """Next-token loss inside each row.

    Shapes:
        ids_BT: integer [B, T], T at least 2; no padding.

    Args:
        model: A causal language model in fp32 whose logits are its head on its last hidden state.
        rows_at_once: Rows in one forward.

    Raises:
        UnsupportedModelError: The model does something else to its logits (soft-capping, scaling).

    Numerics: the forward in the model's dtype, softmax in fp32, its sum and all others in fp64.

    Cost: memory of the activations of ``rows_at_once`` rows and of 64 MiB of logits, a few times.
    """
    with torch.inference_mode():
        _refuse_other_logits(model, ids_BT[:1, :2].long())
        losses: list[float] = []
        for rows_bT in ids_BT.long().split(rows_at_once):
            hidden_bTD = model.base_model(input_ids=rows_bT, use_cache=False).last_hidden_state
            loss_N = torch.cat(
                list(_losses(model, hidden_bTD[:, :-1].flatten(0, 1), rows_bT[:, 1:].flatten()))
            )
            losses += loss_N.reshape(len(rows_bT), -1).mean(dim=1).tolist()
    return DenseLoss(row_losses=tuple(losses))


def _losses(
    model: PreTrainedModel, hidden_ND: torch.Tensor, target_N: torch.Tensor
) -> Iterator[torch.Tensor]:
    """fp64 losses of the predictions, slice by slice: the logits of all of them would not fit."""
    head: Any = model.get_output_embeddings()
    width = max(1, _LOGITS_BYTES // (4 * head.weight.shape[0]))
    for hidden_nD, target_n in zip(hidden_ND.split(width), target_N.split(width), strict=True):
        logits_nV = head(hidden_nD).float()
        picked_n = logits_nV.gather(1, target_n[:, None])[:, 0].double()
        peak_n1 = logits_nV.amax(dim=1, keepdim=True)
        total_n = logits_nV.sub_(peak_n1).exp_().sum(dim=1, dtype=torch.float64)
        yield peak_n1[:, 0].double() + total_n.log() - picked_n


def _refuse_other_logits(model: PreTrainedModel, ids_1T: torch.Tensor) -> None:
    head: Any = model.get_output_embeddings()
    own = model(input_ids=ids_1T, use_cache=False).logits
    hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
    if not torch.allclose(own, head(hidden_1TD), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"the logits of {model.config.model_type} are not its head on its last hidden state;"
            " this evaluation takes models without soft-capping or scaling of logits"
        )
