"""Rows of scores on their way into a checkpoint and back."""

from __future__ import annotations

import pytest
import torch

from clbench.results import Matrix
from clbench.scoring import PackedRows, unpacked


@pytest.mark.parametrize(
    "matrix",
    [
        [],
        [[0.5, None, None], [0.25, 1 / 3, None], [0.0, 1.0, 0.75]],
        [[None, None, None], [None, 0.5, None]],
        [[0.5, 0.25, 0.125]],
    ],
    ids=["nothing", "triangle", "gaps", "full"],
)
def test_rows_come_back_whenever_they_were_packed(matrix: Matrix) -> None:
    row_by_row, at_once = PackedRows(), PackedRows()
    for count in range(len(matrix) + 1):
        saved = row_by_row(matrix[:count])
        assert unpacked(saved, 3) == matrix[:count]
    for name, tensor in at_once(matrix).items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0, equal_nan=True)
    again = PackedRows()
    assert unpacked(again(unpacked(saved, 3)), 3) == matrix


def test_what_was_packed_stays_as_it_was() -> None:
    pack = PackedRows()
    first = pack([[0.5, None]])
    pack([[0.5, None], [0.25, 1.0]])
    assert unpacked(first, 2) == [[0.5, None]]


def test_only_what_was_measured_takes_room() -> None:
    count = 100
    matrix: Matrix = [[0.5] * (i + 1) + [None] * (count - i - 1) for i in range(count)]
    assert PackedRows()(matrix)["numbers"].numel() == count * (count + 1) // 2
