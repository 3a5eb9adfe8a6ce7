"""Bands: every panel in one of them, fine enough to be shared out evenly."""

from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.bands import SumShape, cut_into_bands, rails_of
from quantlib.job.shares import share_by_cost

_SHAPES = st.lists(st.builds(SumShape, st.integers(1, 60_000), st.booleans()), min_size=1, max_size=12)


@given(_SHAPES, st.integers(1, 64))
def test_every_panel_is_in_one_band_and_every_byte_counted(shapes, workers):
    bands = cut_into_bands(shapes, workers)
    panels = [(band.total, panel) for band in bands for panel in range(band.first, band.end)]
    assert panels == [(n, panel) for n, shape in enumerate(shapes) for panel in range(_num_panels(shape))]
    assert sum(band.size_bytes for band in bands) == sum(sum(shape.panel_bytes()) for shape in shapes)


def _num_panels(shape: SumShape) -> int:
    """Of at least 128 rows, and at most 16."""
    height = 128 * max(1, -(-shape.columns // 2048))
    return -(-shape.columns // height)


@given(_SHAPES, st.integers(1, 64))
def test_no_owner_has_much_more_than_its_share(shapes, workers):
    """At most its share and half of it, or one panel where that is more."""
    sizes = [band.size_bytes for band in cut_into_bands(shapes, workers)]
    owned = share_by_cost(sizes, workers)
    assert sorted(band for mine in owned for band in mine) == list(range(len(sizes)))
    share = sum(sizes) / workers
    largest_panel = max(max(shape.panel_bytes()) for shape in shapes)
    most = max(sum(sizes[band] for band in mine) for mine in owned)
    assert most <= share + max(0.5 * share, largest_panel)


def test_panels_of_a_symmetric_sum_end_at_the_diagonal():
    # Rows 0..127 have 128 columns, 128..255 have 256, 256..299 have 300; 8 bytes an entry.
    assert SumShape(300, False).panel_bytes() == [128 * 128 * 8, 128 * 256 * 8, 44 * 300 * 8]
    assert SumShape(300, True).panel_bytes() == [128 * 300 * 8, 128 * 300 * 8, 44 * 300 * 8]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_rails_have_a_worker_of_every_node_and_nobody_twice(counts):
    numbers = iter(range(sum(counts)))
    nodes = {f"n{n}": [next(numbers) for _ in range(count)] for n, count in enumerate(counts)}
    rails = rails_of(nodes)
    assert len(rails) == min(counts)
    assert all(member in nodes[f"n{place}"] for rail in rails for place, member in enumerate(rail))
    members = [member for rail in rails for member in rail]
    assert len(set(members)) == len(members)
