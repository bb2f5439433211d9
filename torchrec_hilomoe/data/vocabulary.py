"""Counting ids in a stream and turning the counts into a vocabulary."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.rows import Int32Array, Int64Array

_COMPACT_ROWS = 1 << 20
_HASHED_TEXTS = 1 << 16


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


def look_up(texts: pa.LargeStringArray, vocabulary: pa.LargeStringArray) -> Int32Array:
    """Table rows of texts: 1 + position in the vocabulary, 0 for unknown and missing texts.

    Args:
        texts (pa.LargeStringArray): [n].
        vocabulary (pa.LargeStringArray): distinct texts.

    Returns:
        Int32Array: [n].

    Example:
        >>> vocabulary = pa.array(["b", "c"], pa.large_string())
        >>> look_up(pa.array(["c", "x", None, "b"], pa.large_string()), vocabulary).tolist()
        [2, 0, 0, 1]
    """
    positions = pc.index_in(texts, value_set=vocabulary).fill_null(-1)
    return positions.to_numpy() + np.int32(1)


class VocabularyIndex:
    """Looks texts up as :func:`look_up` does, without a pass over the vocabulary for each call.

    It takes 12 bytes per value, and is made when it first saves something.

    Args:
        vocabulary (pa.LargeStringArray): distinct texts.

    Example:
        >>> index = VocabularyIndex(pa.array(["b", "c"], pa.large_string()))
        >>> index.look_up(pa.array(["c"], pa.large_string())).tolist()
        [2]
    """

    def __init__(self, vocabulary: pa.LargeStringArray) -> None:
        self._vocabulary = vocabulary

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process hashes otherwise.
        return VocabularyIndex, (self._vocabulary,)

    def look_up(self, texts: pa.LargeStringArray) -> Int32Array:
        """Table rows of texts: 1 + position in the vocabulary, 0 for unknown and missing texts.

        Args:
            texts (pa.LargeStringArray): [n].

        Returns:
            Int32Array: [n].
        """
        if len(texts) >= len(self._vocabulary):  # a pass over the vocabulary is the smaller part
            return look_up(texts, self._vocabulary)
        encoded = texts.dictionary_encode()
        rows = pa.array(self._rows(encoded.dictionary))
        return rows.take(encoded.indices).fill_null(0).to_numpy()

    def _rows(self, texts: pa.LargeStringArray) -> Int32Array:
        hashes, positions, most_alike = self._by_hash
        wanted = _hashes(texts)
        # In order, a search finds most of what it reads where the last one left it.
        order = np.argsort(wanted)
        first = np.empty_like(order)
        first[order] = np.searchsorted(hashes, wanted[order])
        rows = np.zeros(len(texts), np.int32)
        for step in range(most_alike):
            found = positions[np.minimum(first + step, positions.size - 1)]
            same = pc.equal(self._vocabulary.take(pa.array(found)), texts)
            rows = np.where(same.to_numpy(zero_copy_only=False), found + np.int32(1), rows)
        return rows

    @cached_property
    def _by_hash(self) -> tuple[Int64Array, Int32Array, int]:
        """The hashes ascending, whose positions they are, and how many are equal at most."""
        hashes = _hashes(self._vocabulary)
        positions = np.argsort(hashes).astype(np.int32)
        hashes = hashes[positions]
        return hashes, positions, int(np.unique(hashes, return_counts=True)[1].max())


def _hashes(texts: pa.LargeStringArray) -> Int64Array:
    """Python's hashes, which take one call per text however long it is."""
    hashes = np.empty(len(texts), np.int64)
    # In parts, since Python's strings take several times the memory.
    for start in range(0, len(texts), _HASHED_TEXTS):
        part = texts.slice(start, _HASHED_TEXTS).to_pylist()
        hashes[start : start + len(part)] = [hash(text) for text in part]
    return hashes


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
