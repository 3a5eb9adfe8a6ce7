"""Grids of any scheme, also where scales follow from the whole weight."""

from quantlib.grids.given_scales import given_scales
from quantlib.methods.fitted_scales import fitted_scales


def any_grid(weight_RC, scheme, *, scale_dtype, search="mse"):
    """The grid of a weight that is fused with no other."""
    given = given_scales({"w": weight_RC}, [["w"]], scheme, scale_dtype=scale_dtype)
    return fitted_scales(
        weight_RC,
        scheme,
        search=search,
        scale_dtype=scale_dtype,
        importance_C=None,
        given=given.get("w"),
    )
