"""What a linear keeps beside its codes, in either form."""

from collections.abc import Sequence
from typing import cast

from quantlib.outlier_columns import OutlierColumns, joined_columns
from quantlib.outlier_weights import OutlierWeights, joined_weights

Outliers = OutlierColumns | OutlierWeights


def joined_outliers(parts: Sequence[Outliers]) -> Outliers:
    """Of a linear that was cut into rows, in order; all are of one form."""
    if isinstance(parts[0], OutlierColumns):
        return joined_columns(cast(Sequence[OutlierColumns], parts))
    return joined_weights(cast(Sequence[OutlierWeights], parts))
