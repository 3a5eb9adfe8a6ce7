"""Sums of several workers added up through torch.distributed: exact, or refused by all members alike."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlib import rail_group
from quantlib.calibration.totals import BandSum, added
from quantlib.errors import NumericsError
from quantlib.rail_group import GroupFailure, RailGroup

_SIZE = 3


@pytest.fixture
def members():
    groups = [RailGroup("127.0.0.1", torch.device("cpu")) for _ in range(_SIZE)]
    address = groups[0].host()
    with ThreadPoolExecutor(_SIZE) as threads:
        joining = [threads.submit(group.join, address, rank, _SIZE) for rank, group in enumerate(groups)]
        for joined in joining:
            joined.result()
        yield groups, threads


def _bands(seed: int, highest: int) -> list[BandSum]:
    generator = torch.Generator().manual_seed(seed)

    def panel(*shape: int) -> torch.Tensor:
        return torch.randint(-highest, highest, shape, generator=generator, dtype=torch.int64)

    return [
        BandSum(panels=(panel(4, 4), panel(3, 7)), exponent=9),
        BandSum(panels=(panel(5, 6),), exponent=9, is_whole=True),
    ]


def test_members_get_what_adding_them_one_by_one_gives(members):
    groups, threads = members
    given = [_bands(seed, 2**59) for seed in range(_SIZE)]
    kept = [[panel.clone() for band in bands for panel in band.panels] for bands in given]
    found = list(threads.map(lambda group, bands: list(group.reduce(bands, [2, 0])), groups, given))
    for band, owner in enumerate([2, 0]):
        wanted = added([bands[band] for bands in given])
        its = found[owner][band]
        assert all(torch.equal(*pair) for pair in zip(its.panels, wanted.panels, strict=True))
        assert (its.exponent, its.is_whole) == (wanted.exponent, wanted.is_whole)
        assert [its[band] is None for its in found] == [rank != owner for rank in range(_SIZE)]
    left = [[panel for band in bands for panel in band.panels] for bands in given]
    assert all(
        torch.equal(*pair) for mine in zip(left, kept, strict=True) for pair in zip(*mine, strict=True)
    )


def test_sums_that_could_leave_their_range_are_refused_by_every_member(members):
    groups, threads = members
    given = [_bands(seed, 4) for seed in range(_SIZE)]
    given[1][0].panels[1][2, 0] = -(2**61)

    def refused(group, bands) -> bool:
        with pytest.raises(NumericsError, match="one by one"):
            list(group.reduce(bands, [0, 1]))
        return True

    assert all(threads.map(refused, groups, given))


def test_member_that_is_gone_is_an_error_at_the_others(members, monkeypatch):
    monkeypatch.setattr(rail_group, "STEP_TIMEOUT_S", 1.0)
    groups, threads = members

    def failed(group) -> bool:
        with pytest.raises(GroupFailure):
            list(group.reduce(_bands(0, 4), [0, 1]))
        return True

    assert all(threads.map(failed, groups[:2]))


def test_member_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(rail_group, "FORM_TIMEOUT_S", 1.0)
    alone = RailGroup("127.0.0.1", torch.device("cpu"))
    with pytest.raises(GroupFailure):
        alone.join(alone.host(), 0, 2)
