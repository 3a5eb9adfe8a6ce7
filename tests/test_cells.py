"""Streams pass a block once, however often they are asked."""

import pytest
import torch

from quantlib.cells import Stream, cut_into_cells
from quantlib.stream_shelf import Shelf


def test_stream_passes_each_block_once():
    stream = Stream(torch.zeros(1, 1, 1), Shelf())
    for _ in range(3):
        stream.move(0, lambda hidden: hidden + 1)
    stream.move(1, lambda hidden: hidden + 10)
    assert stream.hidden_BTD.item() == 11
    with pytest.raises(AssertionError):
        stream.move(3, lambda hidden: hidden)


def test_stream_stays_where_it_is_when_a_block_fails():
    stream = Stream(torch.zeros(1, 1, 1), Shelf())
    with pytest.raises(ZeroDivisionError):
        stream.move(0, lambda hidden: hidden / (1 // 0))
    stream.move(0, lambda hidden: hidden + 1)
    assert stream.hidden_BTD.item() == 1


def test_cells_hold_every_row_once_in_order():
    rows = torch.arange(33, dtype=torch.int32).reshape(11, 3)
    cells = cut_into_cells(rows, 4, Shelf())
    assert [cell.first_row for cell in cells] == [0, 4, 8]
    assert torch.equal(torch.cat([cell.ids_BT for cell in cells]), rows)
