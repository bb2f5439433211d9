from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from torchrec_hilomoe.data import vocabulary
from torchrec_hilomoe.data.vocabulary import ValueCounts, VocabularyIndex, look_up


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


def random_texts(size: int, values: int, seed: int) -> pa.LargeStringArray:
    rng = random.Random(seed)
    texts = [None if rng.random() < 0.1 else f"v{rng.randrange(values)}" for _ in range(size)]
    return pa.array([*texts, "", "\u00e9" * 5000], pa.large_string()).slice(1)


@pytest.mark.parametrize("hashing", [hash, lambda text: len(text) % 3, lambda text: 0])
def test_an_index_gives_the_rows_of_a_pass_over_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, hashing: object
) -> None:
    monkeypatch.setattr(vocabulary, "hash", hashing, raising=False)
    monkeypatch.setattr(vocabulary, "_HASHED_TEXTS", 7)
    known = random_texts(600, 300, 1).drop_null().unique().slice(3)
    index = VocabularyIndex(known)
    for size in (0, 1, 5, 90, 5000):
        texts = random_texts(size, 600, 2)
        rows = index.look_up(texts)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, look_up(texts, known))
    for texts in (known, known.slice(2, 50), pa.array([None, None], pa.large_string())):
        np.testing.assert_array_equal(index.look_up(texts), look_up(texts, known))
    assert VocabularyIndex(known.slice(0, 0)).look_up(texts).tolist() == [0, 0]


def test_a_few_texts_take_no_pass_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(vocabulary, "hash", lambda t: hashed.append(t) or hash(t), raising=False)
    monkeypatch.setattr(vocabulary, "look_up", None)
    index = VocabularyIndex(pa.array([f"v{i}" for i in range(1000)], pa.large_string()))
    few = pa.array(["v3", "v9", "v3"], pa.large_string())
    assert index.look_up(few).tolist() == [4, 10, 4]
    hashed.clear()
    assert index.look_up(few).tolist() == [4, 10, 4]
    assert sorted(hashed) == ["v3", "v9"]


def test_an_index_is_another_processs_too(tmp_path: Path) -> None:
    index = VocabularyIndex(pa.array([f"v{i}" for i in range(9)], pa.large_string()))
    texts = pa.array(["v8", "x"], pa.large_string())
    assert index.look_up(texts).tolist() == [9, 0]
    (tmp_path / "index").write_bytes(pickle.dumps((index, texts)))
    code = (
        "import pickle, sys; index, texts = pickle.load(open(sys.argv[1], 'rb')); "
        "print(index.look_up(texts).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[9, 0]\n"
