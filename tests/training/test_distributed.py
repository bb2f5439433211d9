from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed as dist

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training.distributed import _store_of_attempt


def test_a_rank_that_never_starts_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(dist, "default_pg_timeout", timedelta(seconds=0.1))
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TrainingError, match=r"rank 1 of 2 did not start within 0:00:00\.1"):
        _store_of_attempt(store, rank=0, world_size=2)
