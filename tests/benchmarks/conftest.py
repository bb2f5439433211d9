from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAN = """
trials: 3
seeds: [0, 1]
models:
  dlrm_cat:
    overrides: [model=dlrm_cat]
    space: {model.over_arch_layer_sizes: ["[4]", "[4, 4]"]}
  hilomoe:
    overrides:
      - model=hilomoe
      - model.expert_width=10
      - model.plain_width=10
      - plugins=[routing_variants] # of benchmarks/, where the runner has to look
    space: {model.num_experts: [2]}
data:
  synthetic:
    overrides: [data.synthetic.train_rows=3000, training.max_train_batches=2]
    space: {model.dropout: [0.0, 0.2]}
    variants:
      flat: {of: hilomoe, overrides: [model.num_layers=1]}
      shipped: {overrides: [model=dlrm]}
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a file of ``benchmarks`` as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = [path.stem for path in BENCHMARKS.glob("*.py")]

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in own:
        sys.modules.pop(name, None)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture
def row_of(load) -> Callable[..., dict[str, Any]]:
    """A run of an entry as it would be written today."""

    def row(entry, kind: str, overrides: list[str], auc: float) -> dict[str, Any]:
        own = {"data": entry.data, "model": entry.model, "kind": kind, "seed": 0, "valid_auc": auc}
        digest = load("accuracy_runs").run_digest(entry, kind, overrides)
        return (
            dict.fromkeys(load("accuracy_runs").COLUMNS, "")
            | own
            | {"overrides": json.dumps(overrides), "config": digest}
        )

    return row
