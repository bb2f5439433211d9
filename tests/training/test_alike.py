"""Values that differ between ranks, the others of which are played here."""

from __future__ import annotations

import re

import pytest
from torch import distributed as dist

from torchrec_hilomoe.config import flat_keys
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training.alike import check_alike

OWN = {"seed": 1, "model": {"name": "dlrm", "scale": float("nan")}}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**OWN, "seed": 2}, "seed (1 on rank 0, 2 on rank 2): must be the same"),
        ({**OWN, "more": 3}, "more (None on rank 0, 3 on rank 2): must be the same"),
        ({"model": OWN["model"]}, "seed (1 on rank 0, None on rank 2): must be the same"),
        ({**OWN, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "3 on rank 2) and 2 more keys: must be"),
    ],
)
def test_keys_that_differ_are_named_with_the_rank(monkeypatch, other, message):
    def gather(of_ranks, own):
        of_ranks[:] = [own, own, {key: repr(value) for key, value in flat_keys(other)}]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_alike(OWN)
