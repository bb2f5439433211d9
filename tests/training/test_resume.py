"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import pytest

from torchrec_hilomoe.errors import ConfigError


def _checkpoints(run):
    return sorted((run / "checkpoints").glob("step-*"))


def test_fewer_training_rows_are_another_run(run_training, tmp_path):
    """Where ids are hashed, the encoders are the same."""
    hashed = (
        "~data.schema.multi_valued",
        "data.schema.dense=[]",
        "data.schema.group=null",
        "data.schema.categorical=[{name: user, hash_size: 50}, {name: brand, hash_size: 50}]",
    )
    run_training(tmp_path / "first", *hashed)
    (source, *_) = _checkpoints(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"rows.train \(640 there, 320 here\)"):
        run_training(
            tmp_path / "second",
            *hashed,
            "data.synthetic.train_rows=320",
            f"checkpoint.resume={source}",
        )
