"""How much of a log loss is over-confidence: scales logits by two numbers fitted on valid.

python examples/evaluate.py checkpoint=... data.test=VALID predictions=valid.parquet
python examples/evaluate.py checkpoint=... data.test=TEST predictions=test.parquet
python benchmarks/calibration.py valid.parquet test.parquet
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pyarrow import parquet
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

Array = npt.NDArray[np.float64]
_SMALLEST = 1e-7  # of probabilities in float32


def main() -> None:
    """Prints the log losses of the second file, and the two numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("valid", type=Path, help="predictions that evaluate.py wrote, to fit by")
    parser.add_argument("test", type=Path, help="likewise, to be scaled")
    args = parser.parse_args()
    print(json.dumps(scaled_log_loss(*read(args.valid), *read(args.test))))


def read(path: Path) -> tuple[Array, Array]:
    """Labels and probabilities of a predictions file."""
    rows = parquet.read_table(path, columns=["label", "prediction"])
    labels, probabilities = (column.to_numpy().astype(np.float64) for column in rows.columns)
    return labels, np.clip(probabilities, _SMALLEST, 1 - _SMALLEST)


def scaled_log_loss(
    fit_labels: Array, fit_probabilities: Array, labels: Array, probabilities: Array
) -> dict[str, float]:
    """Platt's scaling: the logits z become ``slope * z + intercept``.

    Args:
        fit_labels (Array): of the rows to fit by, [n].
        fit_probabilities (Array): likewise, between 0 and 1.
        labels (Array): of the rows to be scaled, [m].
        probabilities (Array): likewise.

    Returns:
        dict[str, float]: ``logloss`` as it is, ``scaled_logloss``, ``slope`` (below 1: the model is
        too sure) and ``intercept``.
    """
    scaling = LogisticRegression(C=np.inf).fit(logit(fit_probabilities)[:, None], fit_labels)
    scaled = scaling.predict_proba(logit(probabilities)[:, None])[:, 1]
    return {
        "logloss": float(log_loss(labels, probabilities)),
        "scaled_logloss": float(log_loss(labels, scaled)),
        "slope": float(scaling.coef_[0, 0]),
        "intercept": float(scaling.intercept_[0]),
    }


if __name__ == "__main__":
    main()
