"""kill -9 at any moment loses nothing but the steps since the last save."""

from __future__ import annotations

import random
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from worker import Fault

pytestmark = pytest.mark.faults

SAVE_POINTS = [
    "save: begin", "save: tensors", "save: checksums", "save: manifest", "save: links",
]  # fmt: skip


def _random_faults(count: int) -> list[Fault]:
    """One rank or both, at a batch, in an evaluation, in a save, or at any time at all."""
    random_ = random.Random(20)
    faults = []
    for _ in range(count):
        ranks = random_.choice([(0,), (1,), (0, 1)])
        kind = random_.choice(["batch", "evaluation", "save", "seconds"])
        if kind == "save":
            point = random_.choice(SAVE_POINTS)
            only_main = point in ("save: begin", "save: manifest", "save: links")
            faults.append(Fault(point, random_.randint(1, 4), (0,) if only_main else ranks))
        elif kind == "seconds":
            faults.append(Fault(kind, random_.uniform(0.0, 1.0), ranks))
        else:
            faults.append(Fault(kind, random_.randint(1, 10), ranks))
    return faults


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run(
    launch, assert_same_run, tmp_path
):
    longer = [f"training.stages.{stage}.epochs=4" for stage in ("warm_up", "specialise", "joint")]
    codes, log = launch(tmp_path / "whole", *longer)
    assert codes == [0, 0], log
    run = tmp_path / "killed"
    struck, steps = 0, [0]
    for fault in _random_faults(100):
        codes, log = launch(run, *longer, fault=fault, timeout=60)
        assert None not in codes, f"{fault}: a rank hangs\n{log}"
        if codes == [0, 0]:
            break
        assert -signal.SIGKILL in codes, f"{fault}: {codes}\n{log}"
        assert "no whole checkpoint" not in log
        struck += 1
        resumed = re.search(r"resuming .*, at batch (\d+)", log)
        steps.append(int(resumed[1]) if resumed else 0)
    else:
        codes, log = launch(run, *longer)
        assert codes == [0, 0], log
    print(f"survived {struck} kills")
    assert struck >= 20
    assert steps == sorted(steps), "a later start resumed from an earlier batch"
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_within_the_first_save(launch, tmp_path, point):
    codes, log = launch(tmp_path, ranks=1, fault=Fault(point, 1))
    assert codes == [-signal.SIGKILL], log
    codes, log = launch(tmp_path, "training.max_train_batches=3", ranks=1)
    if "is of another run" not in log:  # the checkpoint was complete
        assert codes == [0], log
        assert "resuming" not in log


def test_ranks_that_wait_for_a_dead_one_end_with_an_error(launch, tmp_path):
    codes, log = launch(tmp_path, fault=Fault("batch", 7, (1,)), timeout=30)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None), log


@pytest.mark.slow
def test_ranks_that_wait_for_a_stopped_one_end_within_the_timeout(launch, tmp_path):
    codes, log = launch(
        tmp_path,
        "training.timeout_minutes=0.1",
        fault=Fault("batch", 7, (1,), signal.SIGSTOP),
        timeout=30,
    )
    assert codes[1] is None
    assert codes[0] not in (0, None), log
