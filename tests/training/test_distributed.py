from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed as dist

from torchrec_hilomoe.errors import TrainingError
from torchrec_hilomoe.training.distributed import _store_of_attempt, agree


def test_a_rank_that_never_starts_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(dist, "default_pg_timeout", timedelta(seconds=0.1))
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TrainingError, match=r"rank 1 of 2 did not start within 0:00:00\.1"):
        _store_of_attempt(store, rank=0, world_size=2)


def test_an_agreement_may_take_longer_than_other_collectives(device, monkeypatch):
    """As while rank 0 encodes the data."""
    timeouts, used = {}, []
    new_group, gather = dist.new_group, dist.all_gather_object

    def noting_timeout(**options):
        group = new_group(**options)
        timeouts[group] = options["timeout"]
        return group

    def noting_group(errors, error, group):
        used.append(group)
        gather(errors, error, group=group)

    monkeypatch.setattr(dist, "new_group", noting_timeout)
    monkeypatch.setattr(dist, "all_gather_object", noting_group)
    assert agree(lambda: 3, timedelta(hours=5)) == 3
    assert timeouts == {used[0]: timedelta(hours=5)}
    assert agree(lambda: 4) == 4
    assert used[1:] == [None]
