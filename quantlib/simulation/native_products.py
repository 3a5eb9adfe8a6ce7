"""Which generations of NVIDIA GPUs multiply numbers of a format as they are.

Sources, read in November 2026: integers of 8 and 4 bits from Turing on (sm_75), as CUTLASS's tables of
functionality and LLVM's D60279 list them, but none of 4 bits among the products that came with Hopper
(``wgmma``) and Blackwell (``tcgen05.mma`` of kind i8 alone): CUTLASS ``functionality.md`` and
``blackwell_functionality.md``; FP8 on compute capability 8.9 and not on 8.6: TensorRT-RTX's support matrix;
block-scaled products of MXFP8, MXFP4 and NVFP4 on Blackwell (``tcgen05.mma`` of kinds mxf8f6f4, mxf4 and
mxf4nvf4): CUTLASS again.
"""

from collections.abc import Mapping

from quantlib.grids.formats import DIVIDED_SCALES, INTEGER, PLAIN_SCALES, PORTABLE_SCALES, POWER_SCALES
from quantlib.schemes import WeightScheme

NATIVE: Mapping[str, tuple[str, ...]] = {
    "int4": ("Turing", "Ampere", "Ada"),
    "int8": ("Turing", "Ampere", "Ada", "Hopper", "Blackwell"),
    "fp8": ("Ada", "Hopper", "Blackwell"),
    "mxfp8": ("Blackwell",),
    "mxfp4": ("Blackwell",),
    "nvfp4": ("Blackwell",),
}
# (number, bits, scales) of a scheme -> name of what its codes are.
_NAMES = {
    (INTEGER, 4, PLAIN_SCALES): "int4",
    (INTEGER, 8, PLAIN_SCALES): "int8",
    ("e4m3", 8, PLAIN_SCALES): "fp8",
    ("e4m3", 8, POWER_SCALES): "mxfp8",
    ("e2m1", 4, POWER_SCALES): "mxfp4",
    ("e2m1", 4, DIVIDED_SCALES): "nvfp4",
}


def native_format(scheme: WeightScheme) -> str | None:
    """What the codes of a scheme are to a GPU; None where no generation multiplies such numbers.

    >>> from quantlib.schemes import scheme_from_name
    >>> native_format(scheme_from_name("W4A16")), native_format(scheme_from_name("W3A16"))
    ('int4', None)
    """
    scales = PLAIN_SCALES if scheme.scales == PORTABLE_SCALES else scheme.scales
    return _NAMES.get((scheme.number, scheme.bits, scales))
