"""Pauses that all ranks take at the same batch: for a save, or because a signal asks to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

import torch
from torch import distributed as dist

from torchrec_hilomoe.training.distributed import is_main_rank

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_BETWEEN_AGREEMENTS = 0.5


class TrainingInterrupted(Exception):  # noqa: N818 (nothing is wrong)
    """A signal ended the training; started again, it goes on from a checkpoint.

    Attributes:
        exit_code (int): for the process: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            f"ended by {signal.Signals(number).name}; start again to resume, but not with "
            "checkpoint.resume=never"
        )
        self.exit_code = 128 + number


class Watch:
    """Watches for SIGTERM, SIGINT and the time of the next save, on all ranks alike.

    Whichever rank gets a signal, and however the ranks' clocks differ, all of them stop taking
    batches after the same one: about twice a second they agree by one small all-reduce. Used as
    a context manager, in which the signals do nothing else. Repeated signals change nothing.

    Args:
        every_minutes (float | None): time between two saves, by rank 0's clock.

    Attributes:
        signal (int): the signal that ends the training; 0 as long as there is none.
        save_due (bool): the time of a save has come.
    """

    def __init__(self, every_minutes: float | None) -> None:
        self.signal = 0
        self.save_due = False
        self._seconds = None if every_minutes is None else every_minutes * 60
        self._saved_at = time.monotonic()
        self._received = 0
        self._begin()

    def __enter__(self) -> Watch:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def saved(self) -> None:
        """Starts the time to the next save."""
        self._saved_at = time.monotonic()
        self.save_due = False

    def until_pause(self, batches: Iterable[T]) -> Iterator[T]:
        """Hands batches on until a signal or a save interrupts them.

        Args:
            batches (Iterable[T]): as many on every rank, taken in the main thread: a pipeline
                that loads in a thread of its own would mix up the collectives.

        Yields:
            T: the batches.
        """
        self._begin()
        for batch in batches:
            yield batch
            self._agree()
            if self.signal or self.save_due:
                return

    def signal_check(self) -> Callable[[], bool]:
        """For work that a signal interrupts, but no save.

        Returns:
            Callable[[], bool]: to be called by every rank after each batch, in the main thread;
                whether to stop.
        """
        self._begin()

        def check() -> bool:
            self._agree()
            return bool(self.signal)

        return check

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def _begin(self) -> None:
        """The pace of what was before says nothing."""
        self._batches, self._batches_left = 1, 0
        self._agreed_at = time.monotonic()

    def _agree(self) -> None:
        """Takes the signals of all ranks and rank 0's clock, if it is time for that."""
        if self._batches_left:
            self._batches_left -= 1
            return
        now = time.monotonic()
        due = interval = 0
        if is_main_rank():
            due = self._seconds is not None and now - self._saved_at >= self._seconds
            pace = self._batches / max(now - self._agreed_at, 1e-6)
            interval = min(int(pace * _SECONDS_BETWEEN_AGREEMENTS) + 1, 2 * self._batches)
        values = torch.tensor([self._received, due, interval])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        self.signal, save_due, self._batches = values.tolist()
        self.save_due = self.save_due or bool(save_due)
        self._batches_left = self._batches - 1
        self._agreed_at = now
