"""Where a run stands: all of its state that is no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchrec_hilomoe.config import STRICT


@dataclass
class Progress:
    """Where a run stands, between two batches. It is saved with every checkpoint.

    Attributes:
        step (int): global batches trained.
        samples (int): samples trained, over all ranks.
        seconds (float): time spent on training batches, evaluations excluded.
        stage (str | None): the stage it is in; None before the first.
        stage_step (int): batches trained in this stage.
        epoch (int): the epoch of the next batch.
        position (int): batches of that epoch already trained.
        evaluation_due (bool): an evaluation comes before the next batch.
        since_best (int): evaluations of this stage since the last new best.
        valid_auc (float | None): of the last evaluation.
        best (float | None): best value on valid so far of what ``training.monitor`` names.
        best_here (float | None): the best of those whose weights are in the output folder; another
            one where a run goes on from a checkpoint in another folder.
        plateau (float): the factor of the ``plateau`` schedule.
        skipped (int): batches left out because loss or gradients were not finite.
        stages (dict): per stage, its batches, its valid AUC before and after, and `ExpertHealth` of
            each router at its last evaluation.
        finished (bool): all stages are done.
    """

    __pydantic_config__ = STRICT

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    stage: str | None = None
    stage_step: int = 0
    epoch: int = 0
    position: int = 0
    evaluation_due: bool = True
    since_best: int = 0
    valid_auc: float | None = None
    best: float | None = None
    best_here: float | None = None
    plateau: float = 1.0
    skipped: int = 0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: bool = False
