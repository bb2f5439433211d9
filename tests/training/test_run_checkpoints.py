"""Which checkpoint `last` and `best` point to, and what is kept, over several starts of a run."""

from __future__ import annotations

import itertools
import json

import pytest

from torchrec_hilomoe.training.checkpoint import folder


class Died(Exception):
    """The end of a process in a save."""


def _links(run) -> dict[str, str]:
    return {
        path.name: path.readlink().name
        for path in (run / "checkpoints").iterdir()
        if path.is_symlink()
    }


def _metrics(run) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    return {k: v for k, v in metrics.items() if k not in ("output_dir", "train_samples_per_second")}


def test_links_that_a_dead_process_left_behind_are_moved_on(run_training, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls, point = itertools.count(1), folder._point

        def die(*arguments) -> None:
            if next(calls) == 2:  # of step 10, whole and the first best
                raise Died
            point(*arguments)

        patch.setattr(folder, "_point", die)
        with pytest.raises(Died):
            run_training(tmp_path / "run")
    assert _links(tmp_path / "run") == {"last": "step-00000005"}
    run_training(tmp_path / "run", kill_after=1)
    assert _links(tmp_path / "run") == {"last": "step-00000010", "best": "step-00000010"}
    run_training(tmp_path / "run")
    run_training(tmp_path / "whole")
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "whole")
