"""What a run shows while it goes on: a progress bar and TensorBoard scalars, on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torchrec_hilomoe.training.distributed import is_main_rank


class Recorder:
    """Progress bar on stderr and TensorBoard scalars; silent on all ranks but 0.

    Args:
        folder (Path): output folder; the scalars go to its subfolder ``tensorboard``.
        batch_size (int): global, for the rate in samples.

    Attributes:
        folder (Path): as given.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder = folder
        self._batch_size = batch_size
        self._writer = SummaryWriter(str(folder / "tensorboard")) if is_main_rank() else None
        self._bar: tqdm | None = None

    def stage_begins(self, name: str, batches: int, done: int = 0) -> None:
        """Opens the bar of a stage.

        Args:
            name (str): the stage.
            batches (int): its planned length.
            done (int): batches that were trained before the run was resumed.
        """
        if self._writer is not None:
            self._bar = tqdm(
                total=batches * self._batch_size,
                initial=done * self._batch_size,
                desc=name,
                unit=" samples",
                unit_scale=True,
                mininterval=1.0,
            )

    def advance(self, loss: float | None, auxiliary: float | None) -> None:
        """Moves the bar on by one batch.

        Args:
            loss (float | None): mean task loss over the ranks, where it was recorded.
            auxiliary (float | None): auxiliary loss, where it was recorded.
        """
        if self._bar is None:
            return
        self._bar.update(self._batch_size)
        if loss is not None:
            shown = {"loss": f"{loss:.4f}"} | ({"aux": f"{auxiliary:.4f}"} if auxiliary else {})
            self._bar.set_postfix(shown, refresh=False)

    def stage_ends(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Writes scalars.

        Args:
            group (str): ``train`` or ``valid``.
            values (Mapping[str, Any]): by name; None is left out.
            step (int): global step.
        """
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)
        if group == "valid" and values.get("auc") is not None:
            tqdm.write(
                f"batch {step}: valid AUC {values['auc']:.5f}, log loss {values['logloss']:.5f}",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Flushes and closes the scalars' file, and the bar that an error may have left open."""
        self.stage_ends()
        if self._writer is not None:
            self._writer.close()
