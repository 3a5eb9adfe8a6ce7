"""How rows are cut, of a square sum into panels and of a weight into runs: functions of their size alone."""

import math
from collections.abc import Iterator

# A run of a weight of 16384 columns is 268 MB in fp32.
WEIGHT_ROWS = 4096
# Rows of a product of which a GPU has enough to do at once: with as many columns 128 tiles of 128 x 256, and
# an H100 or H200 has 132 multiprocessors. Half as many rows leave some of them idle at the top of a triangle,
# twice as many compute more above its diagonal.
_PRODUCT_ROWS = 2048


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


def strip_shapes(columns: int, device_type: str) -> list[tuple[int, int]]:
    """Of the products that make a symmetric sum: a panel each, on a GPU as many neighbours as it can use.

    Args:
        device_type: ``cpu`` or ``cuda``.

    >>> strip_shapes(300, "cpu") == panel_shapes(300, is_whole=False)
    True
    >>> strip_shapes(5120, "cuda"), strip_shapes(300, "cuda")
    ([(1920, 1920), (1920, 3840), (1280, 5120)], [(300, 300)])
    """
    panels = panel_shapes(columns, is_whole=False)
    number = max(1, _PRODUCT_ROWS // panels[0][0]) if device_type == "cuda" else 1
    strips = [panels[first : first + number] for first in range(0, len(panels), number)]
    return [(sum(rows for rows, _ in strip), strip[-1][1]) for strip in strips]


def weight_runs(rows: int) -> list[slice]:
    """Rows of a weight that are multiplied at a time.

    >>> weight_runs(5000)
    [slice(0, 4096, None), slice(4096, 5000, None)]
    """
    return [slice(start, min(start + WEIGHT_ROWS, rows)) for start in range(0, rows, WEIGHT_ROWS)]
