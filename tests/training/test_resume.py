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


def test_a_finished_run_is_not_gone_on_with_by_changes(run_training, tmp_path):
    run_training(tmp_path / "run")
    unfinished, finished = _checkpoints(tmp_path / "run")
    longer = "training.stages.joint.epochs=3"
    for output_dir, resume in [("run", "auto"), ("other", finished)]:
        with pytest.raises(ConfigError, match=r"epochs \(2.0 there, 3.0 here\)") as error:
            run_training(tmp_path / output_dir, longer, f"checkpoint.resume={resume}")
        assert "It is finished" in str(error.value)
        assert "checkpoint.resume=PATH" not in str(error.value)
        assert "checkpoint.warm_start" in str(error.value)
    metrics = run_training(tmp_path / "other", longer, f"checkpoint.resume={unfinished}")
    assert metrics["train_batches"] == 30


def test_a_checkpoint_under_a_name_of_the_users_is_one_of_another_folder(run_training, tmp_path):
    run_training(tmp_path, kill_after=7)
    renamed = tmp_path / "checkpoints" / "good"
    (tmp_path / "checkpoints" / "step-00000005").rename(renamed)
    metrics = run_training(tmp_path, f"checkpoint.resume={renamed}")
    assert metrics["train_batches"] == 20
    assert renamed.exists()
