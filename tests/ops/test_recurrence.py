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


def test_scores_and_logits_may_be_changed_in_place() -> None:
    draws = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    inputs = [draw.requires_grad_() for draw in draws]

    def gradients(in_place: bool) -> tuple[torch.Tensor, ...]:
        scores, logits = recurrence.score_recurrence(*inputs, num_layers=2, top_k=None)
        scores = scores.mul_(3.0) if in_place else scores * 3.0
        logits = logits.mul_(2.0) if in_place else logits * 2.0
        return torch.autograd.grad(scores.square().sum() + logits.square().sum(), inputs)

    torch.testing.assert_close(gradients(True), gradients(False))
