from __future__ import annotations

import random
from collections import Counter

import pyarrow as pa
import pytest

from torchrec_hilomoe.data import vocabulary
from torchrec_hilomoe.data.vocabulary import ValueCounts, look_up


@pytest.mark.parametrize("compact_rows", [1, 50, 1 << 20])
@pytest.mark.parametrize("min_count", [1, 3])
def test_counts_of_chunks_equal_a_counter(
    monkeypatch: pytest.MonkeyPatch, compact_rows: int, min_count: int
) -> None:
    monkeypatch.setattr(vocabulary, "_COMPACT_ROWS", compact_rows)
    rng = random.Random(1)
    texts = [
        rng.choice([None, *(f"v{int(rng.expovariate(0.05))}" for _ in range(3))])
        for _ in range(2000)
    ]
    counts = ValueCounts()
    for start in range(0, len(texts), 90):
        counts.add(pa.array(texts[start : start + 90], pa.large_string()))
    expected = Counter(text for text in texts if text is not None)
    ordered = sorted(expected, key=lambda text: (-expected[text], text))
    assert counts.vocabulary(min_count).to_pylist() == [
        text for text in ordered if expected[text] >= min_count
    ]


def test_merging_keeps_only_distinct_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_COMPACT_ROWS", 100)
    counts = ValueCounts()
    for _ in range(200):
        counts.add(pa.array([f"v{i}" for i in range(10)], pa.large_string()))
    assert sum(table.num_rows for table in counts._tables) <= 120


def test_without_values_everything_is_unknown() -> None:
    counts = ValueCounts()
    assert len(counts.vocabulary()) == 0
    counts.add(pa.array([None, None], pa.large_string()))
    assert look_up(pa.array(["x", None], pa.large_string()), counts.vocabulary()).tolist() == [0, 0]
