"""How the rows of a square sum are cut into panels: a function of its size alone."""

import math
from collections.abc import Iterator


def panels_of(columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of the panels; their shapes decide how sums are grouped.

    Sixteen panels waste a 32nd of the work above the diagonal; below 128 rows a product is no longer fast.

    >>> list(panels_of(300))
    [(0, 128), (128, 256), (256, 300)]
    """
    height = 128 * max(1, math.ceil(columns / 2048))
    for start in range(0, columns, height):
        yield start, min(start + height, columns)


def panel_shapes(columns: int, *, is_whole: bool) -> list[tuple[int, int]]:
    """Of a sum's panels: all columns of a whole one, of a symmetric one those up to the panel's end.

    >>> panel_shapes(300, is_whole=False)
    [(128, 128), (128, 256), (44, 300)]
    """
    return [(end - start, columns if is_whole else end) for start, end in panels_of(columns)]
