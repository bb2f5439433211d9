"""Which rows of the raw files were left out, and so which ones the others are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from torchrec_hilomoe.data.parse import ParsedRows
from torchrec_hilomoe.data.rows import Int64Array


class Gaps:
    """The data rows that parsed rows pass over."""

    def __init__(self) -> None:
        self._parts: list[Int64Array] = []

    def noted(self, chunks: Iterable[ParsedRows]) -> Iterator[ParsedRows]:
        """Hands parsed rows on, in order, and notes what they pass over."""
        end = 0
        for rows in chunks:
            if rows.positions.size:
                expected = np.arange(end, rows.positions[-1] + 1)
                if expected.size > rows.positions.size:
                    self._parts.append(np.setdiff1d(expected, rows.positions, assume_unique=True))
                end = expected[-1] + 1
            yield rows

    @property
    def positions(self) -> Int64Array:
        """The rows passed over so far, ascending."""
        return np.concatenate([np.empty(0, np.int64), *self._parts])


def positions_beside(gaps: Int64Array, num_rows: int) -> Int64Array:
    """The data rows that are no gaps.

    Args:
        gaps (Int64Array): ascending data rows.
        num_rows (int): how many to name.

    Returns:
        Int64Array: ascending, [num_rows].

    Example:
        >>> positions_beside(np.array([0, 2]), 3)
        array([1, 3, 4])
    """
    return np.delete(np.arange(num_rows + gaps.size), gaps)
