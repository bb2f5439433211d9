from __future__ import annotations

import numpy as np
import pytest

from torchrec_hilomoe.data import DenseColumn
from torchrec_hilomoe.data.dense import Moments, transform


def test_moments_of_chunks_equal_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(1e6, 3.0, 5000)
    values[::7] = np.nan
    moments = Moments()
    for start in range(0, 5000, 617):
        moments.add(values[start : start + 617])
    moments.add(np.array([np.nan]))
    assert moments.count == np.isfinite(values).sum()
    assert moments.mean == pytest.approx(np.nanmean(values), rel=1e-13)
    assert moments.deviation == pytest.approx(np.nanstd(values), rel=1e-9)


@pytest.mark.parametrize("constant", [3.0, 0.1, -1 / 3, 1e6 + 0.1, 7e-30, 0.0])
@pytest.mark.parametrize("chunks", [[5], [1000], [131_072, 999, 65_536], [7, 1, 3] * 50])
def test_a_constant_column_is_only_shifted(constant: float, chunks: list[int]) -> None:
    moments = Moments()
    for rows in chunks:
        moments.add(np.full(rows, constant))
    assert moments.deviation == 1.0
    column = DenseColumn("x", transform="standardize")
    shifted = transform(np.array([constant, constant + 2.0, np.nan]), column, moments)
    np.testing.assert_allclose(shifted, [0.0, 2.0, 0.0], atol=1e-8)


def test_a_small_spread_around_a_large_mean_is_not_constant() -> None:
    moments = Moments()
    moments.add(1e9 + np.array([0.0, 1e-3, 2e-3]))
    assert moments.deviation == pytest.approx(np.sqrt(2 / 3) * 1e-3, rel=1e-3)


def test_without_numbers_the_deviation_is_one() -> None:
    assert Moments().deviation == 1.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [-4.0, 0.5, 9.0]),
        ("log", [-np.log(5), np.log(1.5), 9.0]),
        ("standardize", [-3.0, -0.75, 9.0]),
    ],
)
def test_transform_then_fill(kind: str, expected: list[float]) -> None:
    column = DenseColumn("x", missing=9.0, transform=kind)  # type: ignore[arg-type]
    moments = Moments(count=2, mean=2.0, squares=8.0) if kind == "standardize" else None
    result = transform(np.array([-4.0, 0.5, np.nan]), column, moments)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_standardised_numbers_stay_finite():
    column = DenseColumn("x", transform="standardize")
    moments = Moments(count=2, mean=0.0, squares=2e-8)
    values = transform(np.array([1e36, -1e36, 1e-4]), column, moments)
    assert np.isfinite(values).all()
    assert values[2] == pytest.approx(1.0)
