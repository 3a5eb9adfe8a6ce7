"""Which rows of linears are solved together, from shapes alone.

Rows know nothing of each other once what belongs to the columns is made, so a solve is cut into *row tiles*:
large linears every so many rows, small ones stacked. Where the cuts are never depends on workers or memory.
Small tiles of one shape that read unlike inputs cannot be stacked, yet they are solved as one *batch*: that
saves calls, and changes no bit on a CPU.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Entries of a tile: enough arithmetic for a worker to fetch it, few enough that its buffers are small beside
# a factor.
_TILE_ENTRIES = 1 << 24
# Fewest and most rows. On a CPU a tile's columns should stay in cache; on a GPU a loop over columns costs
# calls, as many for few rows as for many.
_BOUNDS = {"cpu": (512, 4096), "cuda": (4096, 16384)}
# Entries of a batch, those of the factors included: so much is held beside what one tile takes.
_BATCH_ENTRIES = {"cpu": 1 << 24, "cuda": 1 << 25}


@dataclass(frozen=True, slots=True)
class RowRun:
    """Neighbouring rows of a linear.

    Attributes:
        name: Of the linear.
        start: First row.
        end: Row behind the last.
    """

    name: str
    start: int
    end: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.end - self.start


# Rows solved as one, of linears that share input, method and scheme.
Tile = tuple[RowRun, ...]


def device_type_of(device_kind: str) -> str:
    """What bounds the tiles on a kind of device (`Plan.device_kind`).

    >>> device_type_of("cuda-sm90-nvidia-h200")
    'cuda'
    """
    return device_kind.partition("-")[0]


def tile_height(columns: int, device_type: str) -> int:
    """Most rows of a tile, a power of two.

    >>> [tile_height(columns, "cpu") for columns in (64, 4096, 14336, 53248)]
    [4096, 4096, 1024, 512]
    >>> [tile_height(columns, "cuda") for columns in (64, 1024, 14336)]
    [16384, 16384, 4096]
    """
    fewest, most = _BOUNDS[device_type]
    wanted = 1 << max(0, (_TILE_ENTRIES // columns).bit_length() - 1)
    return min(max(wanted, fewest), most)


def batch_size(rows: int, columns: int, device_type: str) -> int:
    """How many tiles of one shape, each with a factor of its own, are solved as one batch at most.

    On a CPU nothing is left to gain from a batch that has more rows than a tile may have.

    >>> [batch_size(rows, columns, "cpu") for rows, columns in ((256, 512), (1536, 2048), (2048, 4096))]
    [16, 2, 1]
    >>> [batch_size(rows, columns, "cuda") for rows, columns in ((256, 512), (1536, 2048), (7168, 2048))]
    [64, 4, 1]
    """
    _, most_rows = _BOUNDS[device_type]
    return max(1, min(most_rows // rows, _BATCH_ENTRIES[device_type] // (columns * (rows + columns))))


def row_tiles(rows: Mapping[str, int], height: int) -> list[Tile]:
    """Tiles of linears that share input, method and scheme; the rows of each are in order.

    Args:
        rows: Linear -> its rows.
        height: Most rows of a tile.

    >>> [[run.rows for run in tile] for tile in row_tiles({"q": 20, "k": 4, "v": 4, "o": 9}, 16)]
    [[16], [4], [4, 4], [9]]
    """
    tiles: list[Tile] = []
    # Whether linears may still join the last tile.
    is_open = False
    for name, count in rows.items():
        runs = [RowRun(name, start, min(start + height, count)) for start in range(0, count, height)]
        if is_open and sum(run.rows for run in tiles[-1]) + count <= height:
            tiles[-1] += tuple(runs)
        else:
            tiles += [(run,) for run in runs]
            is_open = len(runs) == 1
    return tiles


def cut_tile(tile: Tile, pieces: int) -> list[Tile]:
    """Tiles of so many times fewer rows, of the same rows; each linear's are in order.

    >>> [[(run.name, run.start, run.end) for run in cut] for cut in cut_tile((RowRun("k", 32, 64),), 2)]
    [[('k', 32, 48)], [('k', 48, 64)]]
    """
    height = math.ceil(tile_rows(tile) / pieces)
    first = {run.name: run.start for run in tile}
    return [
        tuple(RowRun(run.name, first[run.name] + run.start, first[run.name] + run.end) for run in cut)
        for cut in row_tiles({run.name: run.rows for run in tile}, height)
    ]


def tile_rows(tile: Tile) -> int:
    """Rows of a tile.

    >>> tile_rows((RowRun("k", 0, 4), RowRun("v", 0, 4)))
    8
    """
    return sum(run.rows for run in tile)
