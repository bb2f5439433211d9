"""Running statistics over the ranks, the others of which are played here."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn

from torchrec_hilomoe.training.batch_norms import average_statistics


def test_ranks_evaluate_with_the_mean_of_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    learning, frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()
    others = {learning.running_mean: [1.0, 3.0], learning.running_var: [3.0, 5.0]}
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda own: own.add_(torch.tensor(others[own])))
    average_statistics(nn.Sequential(learning, frozen))
    assert learning.running_mean.tolist() == [0.5, 1.5]
    assert learning.running_var.tolist() == [2.0, 3.0]
    assert (frozen.running_mean.tolist(), frozen.running_var.tolist()) == ([0, 0], [1, 1])
