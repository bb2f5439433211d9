"""The learning-rate schedule: one factor for all parts."""

from __future__ import annotations

import math

from torchrec_hilomoe.training.config import ScheduleConfig


class LearningRateSchedule:
    """Gives the factor on every learning rate, from the global step and the evaluations so far.

    It outlives the stages, each of which has optimizers of its own, and it holds for fused and
    dense optimizers alike; so it is a number, not a `torch.optim.lr_scheduler`.

    Args:
        config (ScheduleConfig): which schedule.
        total_steps (int): planned steps of the whole run, for the decays.
        plateau (float): what ``plateau`` has come to in a run that is continued.

    Attributes:
        plateau (float): the factor that ``plateau`` has come to.

    Example:
        >>> schedule = LearningRateSchedule(ScheduleConfig("linear", warmup_batches=2), 10)
        >>> [round(schedule.factor(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, config: ScheduleConfig, total_steps: int, plateau: float = 1.0) -> None:
        self._config = config
        self._total_steps = total_steps
        self.plateau = plateau

    def factor(self, step: int, left_out: int = 0) -> float:
        """The factor for a step.

        Args:
            step (int): global step, from 0.
            left_out (int): planned steps that stages before left out, since they stopped early.

        Returns:
            float: the factor.
        """
        warmup = self._config.warmup_batches
        if step < warmup:
            return self.plateau * (step + 1) / warmup
        progress = min(1.0, (step + left_out - warmup) / max(1, self._total_steps - warmup))
        low = self._config.final_factor
        if self._config.name == "linear":
            return low + (1 - low) * (1 - progress)
        if self._config.name == "cosine":
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.plateau

    def evaluated(self, improved: bool) -> None:
        """Takes the outcome of an evaluation; matters to ``plateau``.

        Args:
            improved (bool): whether it was a new best.
        """
        if self._config.name == "plateau" and not improved:
            self.plateau *= self._config.plateau_factor
