"""Scoring batches with a sharded model."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys

import torch
from torchrec.datasets.utils import Batch

from torchrec_hilomoe.analysis import ExpertUsage
from torchrec_hilomoe.training import predict
from torchrec_hilomoe.training.optimizers import fused_modules
from torchrec_hilomoe.training.stages import core_model


def test_torchrecs_own_batches_are_scored_as_this_librarys(make_model, make_batch, device):
    model, batches = make_model(), [make_batch(seed) for seed in range(3)]
    plain = [Batch(b.dense_features, b.sparse_features, b.labels) for b in batches]
    metrics = [predict(model, b, device).compute() for b in (batches, plain)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["samples"] == 96


def test_dropout_and_batch_norms_are_those_of_an_evaluation(make_model, make_batch, device):
    model = make_model(dropout=0.5, batch_norm=True).train()
    (first, _), (again, _) = (predict(model, [make_batch()], device).batches()[0] for _ in range(2))
    assert torch.equal(first, again)


def test_optimizers_stay_as_they_were(make_model, make_batch, device):
    model = make_model()
    steps = [(int(module.iter), int(module.iter_cpu)) for module in fused_modules(model)]
    predict(model, [make_batch(seed) for seed in range(3)], device)
    assert steps
    assert steps == [(int(module.iter), int(module.iter_cpu)) for module in fused_modules(model)]


def test_processes_are_forked_after_it_without_errors(make_model, make_batch, device, monkeypatch):
    parent = os.getpid()
    gc.disable()  # a thread that has ended counts as long as it is there
    try:
        predict(make_model(), [make_batch()], device)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "unraisablehook", lambda _: os.getpid() != parent and os._exit(1))
            process = multiprocessing.get_context("fork").Process(target=len, args=("",))
            process.start()
        process.join()
    finally:
        gc.enable()
    assert process.exitcode == 0


def test_padding_counts_neither_in_metrics_nor_in_the_routing(make_model, make_batch, device):
    model, batch = make_model(), make_batch(rows=32)
    batch.labels[20:] = -1
    with ExpertUsage(core_model(model)) as usage:
        metrics = predict(model, [batch], device, usage=usage).compute()
    with ExpertUsage(core_model(model)) as expected, torch.no_grad():
        model(batch)
        expected.add(torch.arange(32) < 20)
    assert metrics["samples"] == 20
    assert usage.compute() == expected.compute() != {}


def test_what_was_stopped_can_be_begun_anew(make_model, make_batch, device):
    model, batches = make_model(), [make_batch(seed) for seed in range(5)]
    whole = predict(model, batches, device).batches()
    part = predict(model, batches, device, stop=lambda: True).batches()
    again = predict(model, batches, device).batches()
    assert (len(whole), len(part), len(again)) == (5, 1, 5)
    for first, second in zip([*whole, whole[0]], [*again, part[0]], strict=True):
        assert torch.equal(first[0], second[0])
