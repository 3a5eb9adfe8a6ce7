"""Scales and zero points that several rows share, which a file holds once.

R rows (out features), G groups, B blocks of rows.
"""

import torch

from quantlib.errors import PackingError
from quantlib.schemes import WHOLE_TENSOR, WeightScheme


def stored_once(name: str, value_RG: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """What a file holds of values that rows share: [1] of a whole weight, else [B, G].

    Raises:
        PackingError: Rows that share a value do not have the same.
    """
    is_one = scheme.group_size == WHOLE_TENSOR
    stored = value_RG[0, :1] if is_one else value_RG[:: scheme.block_rows]
    if not value_RG.is_meta and not torch.equal(for_every_row(stored, scheme, len(value_RG)), value_RG):
        raise PackingError(f"{name}: rows that share a scale or zero point have several", linear=name)
    return stored.contiguous()


def for_every_row(stored: torch.Tensor, scheme: WeightScheme, rows: int) -> torch.Tensor:
    """The values of every row: [R, G], of what `stored_once` gives."""
    if scheme.group_size == WHOLE_TENSOR:
        return stored.reshape(1, 1).expand(rows, 1).contiguous()
    return stored.repeat_interleave(scheme.block_rows, dim=0)[:rows]


def stored_shape(scheme: WeightScheme, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of `stored_once`.

    >>> from quantlib.schemes import scheme_from_name
    >>> stored_shape(scheme_from_name("FP8A16_BLOCK"), 192, 576)
    (2, 5)
    """
    if scheme.group_size == WHOLE_TENSOR:
        return (1,)
    return -(-rows // scheme.block_rows), scheme.num_groups(columns)
