from __future__ import annotations

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from torchrec_hilomoe.training import interruption
from torchrec_hilomoe.training.interruption import TrainingInterrupted, Watch

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_batches_and_is_not_lost(number, code):
    taken = []
    with Watch(None) as watch:
        for batch in watch.until_pause(range(10_000)):
            taken.append(batch)
            if batch == 3:
                os.kill(os.getpid(), number)
        assert watch.signal == number
    assert taken[:4] == [0, 1, 2, 3]
    assert len(taken) < 10, "the pace is not known yet: it looks after 1, 2, 4 batches"
    assert TrainingInterrupted(watch.signal).exit_code == code


def test_the_first_of_several_signals_counts():
    with Watch(None) as watch:
        for _ in watch.until_pause(range(10_000)):
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
        assert watch.signal == signal.SIGTERM


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Watch(None):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_clock_pauses_batches_until_a_save():
    with Watch(every_minutes=0.01) as watch:
        stream = itertools.count()
        started = time.monotonic()
        for _ in watch.until_pause(stream):
            time.sleep(0.01)
        assert 0.6 <= time.monotonic() - started < 30  # not minutes; a busy machine is slow
        assert watch.save_due
        watch.saved()
        assert not watch.save_due
        assert list(itertools.islice(watch.until_pause(stream), 3)) != []


def test_the_time_to_the_next_save_begins_at_the_last(monkeypatch):
    now = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: seconds)
    monkeypatch.setattr(interruption, "time", clock)
    seconds = next(now)
    with Watch(every_minutes=1) as watch:
        for _ in range(3):
            batches = 0
            for _ in watch.until_pause(itertools.count()):
                seconds, batches = next(now), batches + 1  # a batch a second
            assert batches == 60
            watch.saved()


def test_the_pace_of_what_was_before_says_nothing():
    with Watch(None) as watch:
        assert sum(1 for _ in watch.until_pause(range(5000))) == 5000
        taken = 0
        for _ in watch.until_pause(range(10_000)):
            taken += 1
            os.kill(os.getpid(), signal.SIGTERM)
    assert taken < 4


def test_signals_are_left_alone_outside_of_the_main_thread():
    """Python lets no other thread handle them."""

    def take() -> list[int]:
        with Watch(None) as watch:
            return list(watch.until_pause(range(3)))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(take).result() == [0, 1, 2]


def test_a_save_that_is_due_does_not_end_an_evaluation():
    with Watch(every_minutes=1e-6) as watch:
        stop = watch.signal_check()
        assert not any(stop() for _ in range(20))
        os.kill(os.getpid(), signal.SIGTERM)
        assert any(stop() for _ in range(100))


def test_agreements_are_rare_where_batches_are_fast(monkeypatch):
    calls = []
    all_reduce = torch.distributed.all_reduce

    def counting(*args, **kwargs):
        calls.append(1)
        return all_reduce(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", counting)
    with Watch(None) as watch:
        assert sum(1 for _ in watch.until_pause(range(5000))) == 5000
    assert len(calls) < 20
