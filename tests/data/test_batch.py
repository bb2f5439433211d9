from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_hilomoe.data import CTRBatch


def batch(group: torch.Tensor | None) -> CTRBatch:
    sparse = KeyedJaggedTensor(["a"], torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    return CTRBatch(torch.zeros(2, 1), sparse, torch.ones(2), group)


@pytest.mark.parametrize("group", [None, torch.tensor([5, 6])])
def test_moving_keeps_every_part(group: torch.Tensor | None) -> None:
    moved = batch(group).to(torch.device("cpu"))
    assert isinstance(moved, CTRBatch)
    assert moved.sparse_features.values().tolist() == [1, 2, 3]
    assert moved.labels.tolist() == [1, 1]
    assert (moved.group is None) == (group is None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinning_and_streams_reach_the_group() -> None:
    pinned = batch(torch.tensor([5, 6])).pin_memory()
    assert pinned.group is not None
    assert pinned.group.is_pinned()
    moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert moved.group is not None
    assert moved.group.tolist() == [5, 6]
