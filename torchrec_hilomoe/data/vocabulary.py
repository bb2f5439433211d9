"""Counting ids in a stream and turning the counts into a vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_COMPACT_ROWS = 1 << 20


class ValueCounts:
    """How often each text occurs in a stream; memory grows with the distinct texts only.

    Example:
        >>> counts = ValueCounts()
        >>> counts.add(pa.array(["b", "a", "b", None, "c"], pa.large_string()))
        >>> counts.add(pa.array(["c", "b"], pa.large_string()))
        >>> counts.vocabulary(min_count=2).to_pylist()
        ['b', 'c']
    """

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._compacted_rows = 0

    def add(self, texts: pa.LargeStringArray) -> None:
        """Counts the texts; null is not counted.

        Args:
            texts (pa.LargeStringArray): any number of texts.
        """
        values, counts = pc.value_counts(texts.drop_null()).flatten()
        self._tables.append(pa.table({"value": values, "count": counts}))
        pending = sum(table.num_rows for table in self._tables) - self._compacted_rows
        if pending > max(_COMPACT_ROWS, self._compacted_rows):
            self._tables = [self._compact()]
            self._compacted_rows = self._tables[0].num_rows

    def vocabulary(self, min_count: int = 1) -> pa.LargeStringArray:
        """The texts seen at least ``min_count`` times: most frequent first, then by value."""
        table = self._compact() if self._tables else _EMPTY
        table = table.filter(pc.greater_equal(table["count"], min_count))
        table = table.sort_by([("count", "descending"), ("value", "ascending")])
        return table["value"].combine_chunks()

    def _compact(self) -> pa.Table:
        groups = pa.concat_tables(self._tables).group_by("value").aggregate([("count", "sum")])
        return groups.select(["value", "count_sum"]).rename_columns(["value", "count"])


_EMPTY = pa.table({"value": pa.array([], pa.large_string()), "count": pa.array([], pa.int64())})


def look_up(texts: pa.LargeStringArray, vocabulary: pa.LargeStringArray) -> npt.NDArray[np.int32]:
    """Table rows of texts: 1 + position in the vocabulary, 0 for unknown and missing texts.

    Args:
        texts (pa.LargeStringArray): [n].
        vocabulary (pa.LargeStringArray): distinct texts.

    Returns:
        npt.NDArray[np.int32]: [n].

    Example:
        >>> vocabulary = pa.array(["b", "c"], pa.large_string())
        >>> look_up(pa.array(["c", "x", None, "b"], pa.large_string()), vocabulary).tolist()
        [2, 0, 0, 1]
    """
    positions = pc.index_in(texts, value_set=vocabulary).fill_null(-1)
    return positions.to_numpy() + np.int32(1)


def extended(vocabulary: pa.LargeStringArray, texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """A vocabulary, and behind it the texts that it lacks.

    Args:
        vocabulary (pa.LargeStringArray): distinct texts.
        texts (pa.LargeStringArray): distinct texts, some of them perhaps in the vocabulary.

    Returns:
        pa.LargeStringArray: the vocabulary first, in its order.

    Example:
        >>> known, seen = (pa.array(texts, pa.large_string()) for texts in (["b", "c"], ["a", "c"]))
        >>> extended(known, seen).to_pylist()
        ['b', 'c', 'a']
    """
    new = texts.filter(pc.invert(pc.is_in(texts, value_set=vocabulary)))
    return pa.concat_arrays([vocabulary, new])
