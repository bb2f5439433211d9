from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_hilomoe.data import NO_GROUP
from torchrec_hilomoe.data.hashing import fnv1a
from torchrec_hilomoe.training import Predictions, grouped_auc


def _random(seed: int = 0, rows: int = 500, levels: int = 20):
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (rows,), generator=generator) / 7
    labels = (torch.rand(rows, generator=generator) < logits.sigmoid()).float()
    return logits, labels


def test_equal_to_sklearn_with_ties():
    logits, labels = _random()
    predictions = Predictions()
    for part in (slice(0, 100), slice(100, 101), slice(101, 500)):
        predictions.add(logits[part], labels[part])
    metrics = predictions.compute()
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert metrics["logloss"] == pytest.approx(log_loss(labels, logits.double().sigmoid()))
    mean = labels.mean().item()
    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    assert metrics["ne"] == pytest.approx(metrics["logloss"] / entropy, rel=1e-6)
    assert metrics["calibration"] == pytest.approx(logits.sigmoid().mean().item() / mean, rel=1e-6)
    assert metrics["samples"] == 500


def test_large_logits_do_not_tie():
    predictions = Predictions()
    predictions.add(torch.tensor([30.0, 40.0, 50.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert predictions.compute()["auc"] == 1.0


def test_padding_is_dropped():
    logits, labels = _random()
    expected, padded = Predictions(), Predictions()
    expected.add(logits, labels)
    padded.add(torch.cat((logits, torch.tensor([9.0]))), torch.cat((labels, torch.tensor([-1.0]))))
    assert padded.compute() == expected.compute()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_groups_may_stay_on_the_host():
    logits, labels = _random()
    groups = torch.arange(500) % 7
    expected, moved = Predictions(), Predictions()
    expected.add(logits, labels, groups)
    moved.add(logits.cuda(), labels.cuda(), groups)
    assert moved.compute() == expected.compute()


def test_one_class_has_no_auc():
    predictions = Predictions()
    predictions.add(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    metrics = predictions.compute()
    assert metrics["auc"] is None
    assert metrics["ne"] is None
    assert metrics["logloss"] == pytest.approx((math.log(2) + math.log1p(math.exp(-1))) / 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_has_no_metrics(value, caplog):
    logits, labels = _random()
    logits[7] = value
    predictions = Predictions()
    predictions.add(logits, labels.sort().values, torch.arange(500) % 7)
    metrics = predictions.compute()
    assert metrics.pop("samples") == 500
    assert metrics == dict.fromkeys(("auc", "logloss", "ne", "calibration", "gauc"))
    assert "1 of 500 predictions" in caplog.text


def test_no_samples():
    assert Predictions().compute()["samples"] == 0


def test_grouped_auc_equals_a_loop_over_groups():
    logits, labels = _random(1)
    group = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(2)) * 10**15
    total = weight = 0.0
    for value in group.unique():
        rows = group == value
        if 0 < labels[rows].mean() < 1:
            total += roc_auc_score(labels[rows], logits[rows]) * int(rows.sum())
            weight += int(rows.sum())
    assert grouped_auc(logits, labels, group) == pytest.approx(total / weight)


def test_grouped_auc_without_a_mixed_group():
    assert grouped_auc(torch.rand(2), torch.tensor([0.0, 1.0]), torch.tensor([1, 2])) is None


def test_rows_of_no_group_are_in_none():
    logits, labels = _random(3)
    users = pa.array([None if i % 3 else f"u{i % 7}" for i in range(500)], pa.large_string())
    group = torch.from_numpy(fnv1a(users).view(np.int64))
    known = torch.arange(500) % 3 == 0
    predictions = Predictions()
    predictions.add(logits, labels, group)
    metrics = predictions.compute()
    assert metrics["samples"] == 500
    assert metrics["gauc"] == grouped_auc(logits[known], labels[known], group[known])
    nobody = Predictions()
    nobody.add(logits, labels, torch.full((500,), NO_GROUP))
    assert nobody.compute()["gauc"] is None
