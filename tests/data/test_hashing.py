from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.hashing import fnv1a, hash_to_rows


def reference(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = "ab0|é漢🙂 "
    return ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(count)]


def test_equals_the_plain_algorithm() -> None:
    texts = random_texts(500)
    array = pa.array(texts, pa.large_string())
    assert fnv1a(array).tolist() == [reference(text) for text in texts]


def test_slices_hash_like_the_texts_they_show() -> None:
    texts = random_texts(50)
    part = pa.array(texts, pa.large_string()).slice(7, 20)
    assert fnv1a(part).tolist() == [reference(text) for text in texts[7:27]]


def test_missing_texts_hash_like_empty_ones_and_go_to_row_zero() -> None:
    array = pa.array(["x", None, "xyz"], pa.large_string())
    assert fnv1a(array).tolist() == [reference("x"), reference(""), reference("xyz")]
    assert hash_to_rows(array, 5)[1] == 0
    assert fnv1a(pa.array([], pa.large_string())).size == 0
    assert fnv1a(pa.array([None, ""], pa.large_string())).tolist() == [reference("")] * 2


def test_rows_stay_the_same_over_versions() -> None:
    texts = ["user_1", "68fd1e64", "漢"]
    rows = hash_to_rows(pa.array(texts, pa.large_string()), 1_000_000).tolist()
    assert rows == [619353, 650088, 823357]
    hashes = [reference(text) for text in texts]
    assert rows == [(h ^ h >> 32) % 1_000_000 + 1 for h in hashes]


def test_the_largest_table_has_no_negative_rows() -> None:
    rows = hash_to_rows(pa.array(random_texts(500), pa.large_string()), 2**31 - 1)
    assert rows.min() > 0
    assert rows.max() > 2**30


def test_rows_fill_the_table_evenly_and_spare_row_zero() -> None:
    rows = hash_to_rows(pa.array([f"{i:08x}" for i in range(64_000)], pa.large_string()), 64)
    counts = np.bincount(rows, minlength=65)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 1000).max() < 6 * np.sqrt(1000)
