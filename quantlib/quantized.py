"""A quantized linear: what methods make, packers take, and both streams run through.

R rows (out features), C columns (in features), G groups of consecutive columns.
Codes travel from the solver to the packer; nothing is rounded a second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quantlib.grids.levels import levels_of
from quantlib.grouping import by_group
from quantlib.outliers import Outliers, joined_outliers
from quantlib.schemes import WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """Of what the scales of a weight, or of some of its rows, are made where they are quantized themselves.

    Scale i of the whole weight, row by row, is value[code i] * absmax[i // 256] + offset in fp32, with the
    values of `quantlib.grids.formats.dynamic_values`.

    Shapes:
        code_RG: uint8 [R, G].
        absmax_N: fp32 [N], of the whole weight.
        offset: fp32 [], of the whole weight.
    """

    code_RG: torch.Tensor
    absmax_N: torch.Tensor
    offset: torch.Tensor

    def rows(self, part: slice) -> "NestedScales":
        """Some rows; a copy, so that it does not keep the whole alive."""
        return NestedScales(code_RG=self.code_RG[part].clone(), absmax_N=self.absmax_N, offset=self.offset)

    def to(self, device: torch.device | str) -> "NestedScales":
        """The same on a device."""
        return NestedScales(
            code_RG=self.code_RG.to(device), absmax_N=self.absmax_N.to(device), offset=self.offset.to(device)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """Codes and fitted grid of one linear.

    Shapes:
        codes_RC: uint8 [R, C], 0 .. 2**bits - 1; not floating, so that a conversion is a copy.
        scale_RG: floating [R, G], already in the dtype that is stored, positive and finite.
        zero_RG: uint8 [R, G], the code that means zero; None when the scheme is symmetric
            (then it is 2**(bits-1) everywhere; codes of floats know none).
        divisor_R1: fp32 [R, 1], the same for all rows, where scales are quotients (``DIVIDED_SCALES``);
            else None.

    Attributes:
        nested: What the scales are made of where they are quantized (``NESTED_SCALES``); else None.
        model_dtype: Of the weight before, which no level depends on and some layouts state; None where
            nobody said it.
        outliers: Columns, or single weights, that mean something else than their codes.
    """

    codes_RC: torch.Tensor
    scale_RG: torch.Tensor
    zero_RG: torch.Tensor | None
    scheme: WeightScheme
    divisor_R1: torch.Tensor | None = None
    nested: NestedScales | None = None
    model_dtype: torch.dtype | None = None
    outliers: Outliers | None = None

    def rows(self, part: slice) -> "QuantizedLinear":
        """Some rows, as views."""
        return replace(
            self,
            codes_RC=self.codes_RC[part],
            scale_RG=self.scale_RG[part],
            zero_RG=None if self.zero_RG is None else self.zero_RG[part],
            divisor_R1=None if self.divisor_R1 is None else self.divisor_R1[part],
            nested=None if self.nested is None else self.nested.rows(part),
            outliers=None if self.outliers is None else self.outliers.rows(part),
        )

    def to(self, device: torch.device | str) -> "QuantizedLinear":
        """The same on a device."""
        return replace(
            self,
            codes_RC=self.codes_RC.to(device),
            scale_RG=self.scale_RG.to(device),
            zero_RG=None if self.zero_RG is None else self.zero_RG.to(device),
            divisor_R1=None if self.divisor_R1 is None else self.divisor_R1.to(device),
            nested=None if self.nested is None else self.nested.to(device),
            outliers=None if self.outliers is None else self.outliers.to(device),
        )

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The levels: scale * offset (see `quantlib.grids.levels`), or the outlier's weight, fp32 [R, C].

        Args:
            out: Receives them if given; floating [R, C].

        Numerics: the product is taken in fp32. The offset of an integer or a small float has at most 9
        significant bits, so that with a bf16 or fp16 scale it is exact.
        """
        level_RC = torch.empty(self.codes_RC.shape, device=self.codes_RC.device) if out is None else out
        self._into(level_RC, self.scale_RG.float()[..., None])
        return level_RC if self.outliers is None else self.outliers.put_into_(level_RC)

    def offsets(self, out: torch.Tensor) -> torch.Tensor:
        """The levels of all codes in units of their scales.

        Args:
            out: Receives them; floating [R, C].
        """
        return self._into(out, None)

    def _into(self, out_RC: torch.Tensor, scale_RG1: torch.Tensor | None) -> torch.Tensor:
        columns = out_RC.shape[1]
        width = self.scheme.columns_per_group(columns)
        code_RGS, out_RGS = by_group(self.codes_RC, width), by_group(out_RC, width)
        zero = self.scheme.middle_code if self.zero_RG is None else self.zero_RG.float()[..., None]
        levels_of(self.scheme).decode(code_RGS, zero, out=out_RGS)
        if scale_RG1 is not None:
            out_RGS.mul_(scale_RG1)
        if out_RGS.numel() != out_RC.numel():  # the last group is ragged: those are no views
            out_RC.copy_(out_RGS.flatten(1)[:, :columns])
        return out_RC


def joined_rows(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """The linear that was cut into these rows, in order; of one part that part itself."""
    first = parts[0]
    if len(parts) == 1:
        return first
    nested = first.nested
    if nested is not None:
        codes = [part.nested.code_RG for part in parts if part.nested is not None]
        nested = replace(nested, code_RG=torch.cat(codes))
    outliers = [part.outliers for part in parts if part.outliers is not None]
    return replace(
        first,
        codes_RC=torch.cat([part.codes_RC for part in parts]),
        scale_RG=torch.cat([part.scale_RG for part in parts]),
        zero_RG=_joined([part.zero_RG for part in parts]),
        divisor_R1=_joined([part.divisor_R1 for part in parts]),
        nested=nested,
        outliers=joined_outliers(outliers) if outliers else None,
    )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
