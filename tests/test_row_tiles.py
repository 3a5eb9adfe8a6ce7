"""Row tiles: every row once and in order, none too high, small linears together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.row_tiles import row_tiles, tile_height, tile_rows

counts = st.lists(st.integers(1, 70), min_size=1, max_size=8)


@given(counts, st.sampled_from([1, 8, 32]))
def test_tiles_hold_every_row_once_and_in_order(rows, height):
    linears = {str(number): count for number, count in enumerate(rows)}
    tiles = row_tiles(linears, height)
    assert all(tile_rows(tile) <= height for tile in tiles)
    for name, count in linears.items():
        runs = [run for tile in tiles for run in tile if run.name == name]
        assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])]
        assert runs[-1].end == count
        assert all(run.rows == height for run in runs[:-1])


@given(counts)
def test_large_linears_share_no_tile_and_small_neighbors_do(rows):
    tiles = row_tiles({str(number): count for number, count in enumerate(rows)}, 32)
    for tile in tiles:
        assert len(tile) == 1 or all(rows[int(run.name)] <= 32 for run in tile)
    for tile, following in zip(tiles, tiles[1:], strict=False):
        small = [tile[-1], following[0]]
        if all(rows[int(run.name)] <= 32 for run in small):
            assert tile_rows(tile) + small[1].rows > 32


@pytest.mark.parametrize(("device", "fewest", "most"), [("cpu", 512, 4096), ("cuda", 4096, 16384)])
def test_heights_are_powers_of_two_for_about_as_many_entries(device, fewest, most):
    for columns in (32, 1000, 4096, 5120, 8192, 14336, 16384, 28672, 53248):
        height = tile_height(columns, device)
        assert height & (height - 1) == 0
        assert fewest <= height <= most
        if fewest < height < most:
            assert height * columns <= 1 << 24 < 2 * height * columns
