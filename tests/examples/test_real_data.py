"""Short runs on real data, where it lies beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multirank,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}"),
]
SHORT = ("training.max_train_batches=12", "training.max_eval_batches=3")


def _splits(folder: str, suffix: str) -> list[str]:
    return [f"data.{split}={DATA / folder / split}{suffix}" for split in ("train", "valid")]


@pytest.mark.parametrize(
    ("data", "files", "auc"),
    [
        ("frappe", _splits("frappe", ".csv.gz"), 0.85),
        ("ml1m_implicit", _splits("ml1m-implicit", ".parquet"), 0.6),
        ("ml100k", _splits("ml100k", ".parquet"), 0.6),
    ],
)
def test_learns_from_the_first_batches(launch, tmp_path, data, files, auc):
    result = launch(f"data={data}", *files, *SHORT, f"output_dir={tmp_path}", ranks=2).result
    assert result["valid"]["auc"] > auc


def test_criteo_format(launch, tmp_path):
    file = DATA / "criteo-sample" / "train.txt"
    result = launch(
        "data=criteo_kaggle",
        f"data.train={file}",
        f"data.test={file}",
        "data.batch_size=32",
        f"output_dir={tmp_path}",
    ).result
    assert result["test"]["samples"] == 200
    # The rows it was trained on.
    assert result["test"]["auc"] > 0.6


def test_frappe_protocol_starts(launch, tmp_path):
    result = launch(
        "experiment=frappe_x1",
        "model=dlrm_cat",
        *_splits("frappe", ".csv.gz"),
        "training.max_train_batches=50",
        f"output_dir={tmp_path}",
    ).result
    assert result["dense_parameters"] == 364_001
    assert result["valid"]["auc"] > 0.9
