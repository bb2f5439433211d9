"""Statistics and transforms of dense columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_hilomoe.data.config import FLOAT32_MAX, DenseColumn

# Sums of equal numbers round to a mean that is off by about 2 units in the last place.
_ROUNDING = 16 * float(np.finfo(np.float64).eps)


@dataclass
class Moments:
    """Running mean and variance of a stream of numbers (Chan, Golub and LeVeque, 1979).

    Example:
        >>> moments = Moments()
        >>> moments.add(np.array([1.0, np.nan, 3.0]))
        >>> moments.add(np.array([5.0]))
        >>> moments.mean, round(moments.deviation, 4)
        (3.0, 1.633)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Takes in numbers; NaN is left out."""
        values = values[~np.isnan(values)]
        if not values.size:
            return
        mean = float(values.mean())
        total = self.count + values.size
        shift = mean - self.mean
        self.squares += float(np.square(values - mean).sum())
        self.squares += shift * shift * self.count * values.size / total
        self.mean += shift * values.size / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation (of the population); 1 where it is 0 up to rounding."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > _ROUNDING * abs(self.mean) else 1.0


def transform(
    values: npt.NDArray[np.float64], column: DenseColumn, moments: Moments | None
) -> npt.NDArray[np.float32]:
    """Applies the transform of a dense column, then fills missing values.

    Args:
        values (npt.NDArray[np.float64]): raw numbers [n]; NaN is missing.
        column (DenseColumn): which transform and fill.
        moments (Moments | None): of the training rows, for ``standardize``.

    Returns:
        npt.NDArray[np.float32]: [n], no NaN.

    Example:
        >>> log = DenseColumn("x", missing=-1.0, transform="log")
        >>> transform(np.array([0.0, np.e - 1, 1 - np.e, np.nan]), log, None).tolist()
        [0.0, 1.0, -1.0, -1.0]
    """
    if column.transform == "log":
        values = np.sign(values) * np.log1p(np.abs(values))
    elif moments is not None:
        values = (values - moments.mean) / moments.deviation
    values = np.clip(values, -FLOAT32_MAX, FLOAT32_MAX)  # standardised ones may leave float32
    return np.where(np.isnan(values), column.missing, values).astype(np.float32)
