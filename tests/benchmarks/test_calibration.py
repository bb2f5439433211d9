"""Scaling of logits, on predictions whose truth is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.special import expit

ROOT = Path(__file__).parents[2]


def test_predictions_that_are_too_sure_are_scaled_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("valid", "test"):
        logits = random.normal(size=200_000)
        labels = random.random(logits.size) < expit(logits)
        said = expit(2 * logits + 0.5).astype(np.float32)
        table = pa.table({"label": labels.astype(np.float32), "prediction": said})
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    done = subprocess.run(
        [sys.executable, "benchmarks/calibration.py", *sorted(tmp_path.iterdir(), reverse=True)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["slope"] == pytest.approx(0.5, abs=0.01)
    assert result["intercept"] == pytest.approx(-0.25, abs=0.02)
    best = -np.mean(labels * np.log(expit(logits)) + ~labels * np.log(expit(-logits)))
    assert result["scaled_logloss"] == pytest.approx(best, abs=1e-4)
    assert result["logloss"] > best + 0.05
