from __future__ import annotations

import importlib.util

import pytest
import torch

from torchrec_hilomoe.ops import recurrence


def test_kernel_runs_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not recurrence.kernel_is_cheaper(torch.zeros(12, 5), None)

    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not recurrence.kernel_is_cheaper(OnGpu(), None)
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert recurrence.kernel_is_cheaper(OnGpu(), None)
        assert not recurrence.kernel_is_cheaper(OnGpu(), 2)
