"""Fair times on a busy machine: cases take turns, and one thread is timed by its own CPU clock."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]


class Times:
    """Seconds of one step of each case, repetition by repetition.

    Args:
        seconds (Mapping[Hashable, list[float]]): by case; the n-th of all ran one after another.
    """

    def __init__(self, seconds: Mapping[Hashable, list[float]]) -> None:
        self._seconds = seconds

    @property
    def cases(self) -> list[Hashable]:
        """The cases, in order."""
        return list(self._seconds)

    def median(self, case: Hashable) -> float:
        """Median seconds of a case."""
        return statistics.median(self._seconds[case])

    def ratio(self, case: Hashable, over: Hashable) -> float:
        """Ratio of the medians of two cases."""
        return self.median(case) / self.median(over)

    def ratio_of_minima(self, case: Hashable, over: Hashable) -> float:
        """Ratio of the shortest times: what is left where other work on the machine adds least."""
        return min(self._seconds[case]) / min(self._seconds[over])

    def ratio_quartiles(self, case: Hashable, over: Hashable) -> tuple[float, float]:
        """Lower and upper quartile of the ratio within a repetition."""
        pairs = zip(self._seconds[case], self._seconds[over], strict=True)
        return _quartiles([a / b for a, b in pairs])

    def summary(self) -> dict[Hashable, dict[str, float]]:
        """Milliseconds by case: minimum, median and quartiles."""
        summary = {}
        for case, seconds in self._seconds.items():
            low, high = _quartiles(seconds)
            values = {"min": min(seconds), "median": self.median(case), "low": low, "high": high}
            summary[case] = {name: round(1e3 * value, 3) for name, value in values.items()}
        return summary


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory, as tcmalloc and jemalloc do and PyTorch advises for training.

    Otherwise it hands it back beyond a threshold that one case stays below and another crosses,
    and the pages of every large tensor of the latter are faulted in anew in each step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of single tensors


def take_turns(cases: Mapping[str, Step], repetitions: int) -> Times:
    """Runs every case once in each repetition, after two rounds of warm-up.

    With one thread the clock is the CPU time of the process, which other processes' turns on a
    shared machine do not add to; with more it is the wall clock.

    Args:
        cases (Mapping[str, Step]): what to run, by name.
        repetitions (int): rounds that count.

    Returns:
        Times: of all rounds that count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for repetition in range(-2, repetitions):
        for case, step in cases.items():
            start = clock()
            step()
            if repetition >= 0:
                seconds[case].append(clock() - start)
    return Times(seconds)


def count_flops(step: Step) -> int:
    """Floating-point operations of the matrix products in one step, 2 for each multiply-add."""
    in_place = {torch.ops.aten.addmm_: _addmm_flops}  # the counter takes these for free
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return counter.get_total_flops()


class Product(NamedTuple):
    """A matrix product to compare rates with."""

    step: Step
    flops: int
    rate: float  # FLOP/s


def best_product(repetitions: int) -> Product:
    """The float32 product of the highest rate, as measured.

    Of square products and those of a linear layer of 4096 x 432 by 432, forward and backward, with
    the result in memory that is there already. A machine's speed drifts with its load, so the
    product has to take turns with what it is compared with.
    """
    shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 432, 432), (432, 4096, 432)]
    cases: dict[str, Step] = {}
    flops: dict[str, int] = {}
    for m, k, n in shapes:
        for transposed in (False, True):
            name = f"{m}x{k}x{n} {transposed}"
            a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            if transposed:
                a, b = a.t().contiguous().t(), b.t().contiguous().t()
            cases[name] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
            flops[name] = 2 * m * k * n
    times = take_turns(cases, repetitions)
    best = max(cases, key=lambda name: flops[name] / times.median(name))
    return Product(cases[best], flops[best], flops[best] / times.median(best))


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _addmm_flops(added: torch.Size, left: torch.Size, right: torch.Size, **kwargs: object) -> int:
    return 2 * left[0] * left[1] * right[1]
