"""What codes mean and which is nearest, in units of a scale: the one place where formats differ for solvers.

An *offset* is a level divided by its scale: code - zero for integers, which may be negative; the value of a
small float or of a codebook otherwise. Solvers work on offsets and store codes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from quantlib.grids.formats import CODEBOOKS, FLOAT_FORMATS, INTEGER, FloatFormat
from quantlib.schemes import ActivationScheme, WeightScheme

# Exponent bits of a number as an integer, by the dtype of the arithmetic.
_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


class Table:
    """Numbers that stay where they were asked for: each copy to a GPU would wait for it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._held: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._values)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers, in their own dtype by default."""
        kind = (device, dtype or self._values.dtype)
        if kind not in self._held:
            self._held[kind] = self._values.to(device=device, dtype=dtype)
        return self._held[kind]


class Levels(Protocol):
    """The levels of one scale; zero points and bounds are meant for integers.

    Attributes:
        bounds: Smallest and largest offset where the zero point is fixed.
        reach: Largest magnitude, divided by the scale that covers it.
        half_step: Half the largest distance between neighbours: a quotient that is farther from its offset
            lies outside the grid.
        is_uniform: Whether all neighbours are equally far apart.
    """

    bounds: tuple[float, float]
    reach: float
    half_step: float
    is_uniform: bool

    def nearest(
        self, quotient: torch.Tensor, lowest: Any, highest: Any, *, out: torch.Tensor
    ) -> torch.Tensor:
        """The offsets nearest to ``quotient``, half to even, saturating; ``out`` may be ``quotient``."""
        ...

    def encode(self, offset: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:
        """The codes of offsets; ``out`` is of an integer dtype."""
        ...

    def decode(self, codes: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:
        """The offsets of codes; ``out`` is floating."""
        ...


class IntegerLevels:
    """Equally spaced: code - zero.

    Args:
        bits: Of a code.
    """

    half_step = 0.5
    is_uniform = True

    def __init__(self, bits: int) -> None:
        middle = 1 << (bits - 1)
        self.bounds: tuple[float, float] = (-middle, middle - 1)
        self.reach = ((1 << bits) - 1) / 2

    def nearest(
        self, quotient: torch.Tensor, lowest: Any, highest: Any, *, out: torch.Tensor
    ) -> torch.Tensor:
        """Rounded half to even, then bounded; see `Levels`."""
        return torch.round(quotient, out=out).clamp_(lowest, highest)

    def encode(self, offset: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:
        """Offset + zero; see `Levels`."""
        return out.copy_(offset).add_(zero)

    def decode(self, codes: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:
        """Code - zero; see `Levels`."""
        return out.copy_(codes).sub_(zero)


class FloatLevels:
    """The values of a small float; their steps grow with them. Zero points and given bounds mean nothing.

    Args:
        format_: Which float.

    Attributes:
        format: The same.
    """

    is_uniform = False

    def __init__(self, format_: FloatFormat) -> None:
        self.format = format_
        self._sign = 1 << (format_.bits - 1)
        magnitudes = torch.tensor(format_.magnitudes)
        # Codes that mean no number decode to NaN.
        positive = torch.full((self._sign,), torch.nan)
        positive[: len(magnitudes)] = magnitudes
        self._magnitudes, self._values = Table(magnitudes), Table(torch.cat((positive, -positive)))
        self.bounds: tuple[float, float] = (-format_.largest, format_.largest)
        self.reach = format_.largest
        self.half_step = (magnitudes[-1] - magnitudes[-2]).item() / 2

    def nearest(
        self,
        quotient: torch.Tensor,
        lowest: Any,  # noqa: ARG002 - it has bounds of its own
        highest: Any,  # noqa: ARG002
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Rounded half to even in the steps of each value's power of two; see `Levels`."""
        kind, exponent_bits = _EXPONENTS[quotient.dtype]
        # The power of two at or below every magnitude: its bits without sign and mantissa.
        step = quotient.view(kind).bitwise_and(exponent_bits).view(quotient.dtype)
        step.clamp_min_(2.0**self.format.smallest_exponent).mul_(2.0**-self.format.mantissa_bits)
        torch.div(quotient, step, out=out)
        return out.round_().mul_(step).clamp_(*self.bounds)

    def encode(self, offset: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - it has none
        """Sign and number of the magnitude; zero has no sign. See `Levels`."""
        magnitudes = self._magnitudes.on(offset.device, offset.dtype)
        numbers = torch.bucketize(offset.abs(), magnitudes, out_int32=True)
        return out.copy_(numbers.add_((offset < 0).int(), alpha=self._sign))

    def decode(self, codes: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - it has none
        """Looked up; see `Levels`."""
        return out.copy_(self._values.on(out.device)[codes.int()])


class CodebookLevels:
    """Given values, one a code. Zero points and given bounds mean nothing.

    Args:
        values: In the order of their codes. Of equal ones, as 0 and -0, the first is chosen.

    Attributes:
        ascending: fp32, the different values in order, on any device.
        middles: fp32, between each and the next, likewise.
    """

    is_uniform = False

    def __init__(self, values: Sequence[float]) -> None:
        all_values = torch.tensor(values)
        by_value = sorted(range(len(values)), key=lambda code: (values[code], code))
        chosen = [code for place, code in enumerate(by_value) if values[code] != values[by_value[place - 1]]]
        ascending = all_values[chosen]
        middles = (ascending[1:] + ascending[:-1]) / 2
        self._values, self._codes = Table(all_values), Table(torch.tensor(chosen))
        self.ascending, self.middles = Table(ascending), Table(middles)
        self.bounds: tuple[float, float] = (min(values), max(values))
        self.reach = max(values)
        self.half_step = ascending.diff().max().item() / 2

    def nearest(
        self,
        quotient: torch.Tensor,
        lowest: Any,  # noqa: ARG002 - it has bounds of its own
        highest: Any,  # noqa: ARG002
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Of two values as near the smaller; see `Levels`."""
        ascending = self.ascending.on(quotient.device, quotient.dtype)
        return out.copy_(ascending[self._places(quotient)])

    def encode(self, offset: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - it has none
        """Looked up; see `Levels`."""
        return out.copy_(self._codes.on(offset.device)[self._places(offset)])

    def decode(self, codes: torch.Tensor, zero: Any, *, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - it has none
        """Looked up; see `Levels`."""
        return out.copy_(self._values.on(out.device)[codes.int()])

    def _places(self, offset: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(offset, self.middles.on(offset.device, offset.dtype), out_int32=True)


@lru_cache
def _levels_of(number: str, bits: int) -> Levels:
    if number == INTEGER:
        return IntegerLevels(bits)
    return CodebookLevels(CODEBOOKS[number]) if number in CODEBOOKS else FloatLevels(FLOAT_FORMATS[number])


def levels_of(scheme: WeightScheme | ActivationScheme) -> Levels:
    """Those of a scheme's number format."""
    return _levels_of(scheme.number, scheme.bits)
