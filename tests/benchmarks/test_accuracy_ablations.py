from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

SHIPPED = Path(__file__).parents[2] / "benchmarks" / "ablations.yaml"
PLAN = """
trials: 0
seeds: [0, 1]
models: {}
data:
  cafe:
    overrides: [data=synthetic]
    variants:
      hilomoe_shipped: {overrides: [model=hilomoe]}
      top 1: {overrides: [model=hilomoe, model.top_k=1]}
      top 4: {overrides: [model=hilomoe, model.top_k=4]}
      model.num_experts=1: {overrides: [model=hilomoe, model.num_experts=1]}
  shop:
    overrides: [data=synthetic]
    variants:
      hilomoe_shipped: {overrides: [model=hilomoe]}
      model.num_layers=1: {overrides: [model=hilomoe, model.num_layers=1]}
  zoo:
    overrides: [data=synthetic]
    variants:
      hilomoe_shipped: {overrides: [model=hilomoe]}
      tied keys: {overrides: [model=hilomoe, model.tied_keys=true]}
"""
AUCS = {
    ("cafe", "hilomoe_shipped"): [0.7, 0.71],
    ("cafe", "top 1"): [0.69, 0.68],
    ("cafe", "model.num_experts=1"): [0.6],
    ("shop", "hilomoe_shipped"): [0.7],
    ("shop", "model.num_layers=1"): [0.7],
    ("zoo", "hilomoe_shipped"): [0.7],
    ("zoo", "tied keys"): [0.7],
}


@pytest.fixture
def finished(load, tmp_path: Path) -> SimpleNamespace:
    """The plan, and its runs so far."""
    import pandas as pd

    (tmp_path / "plan.yaml").write_text(PLAN)
    rows = [
        {"data": data, "model": model, "kind": "seed", "seed": seed}
        | {"test_auc": auc, "valid_auc": 1 - auc}
        | {"test_logloss": 0.5, "flops_per_sample": 2e3, "dense_parameters": 10}
        | {"dead_share": seed / 4 if model == "top 1" else None}
        for (data, model), values in AUCS.items()
        for seed, auc in enumerate(values)
    ]
    plan = load("accuracy_plan").load_plan(tmp_path / "plan.yaml")
    return SimpleNamespace(plan=plan, runs=pd.DataFrame(rows))


def test_ablations_are_compared_with_the_shipped_model(load, finished) -> None:
    table = list(load("accuracy_ablations").ablation_tables(finished.plan, finished.runs))
    assert [line for line in table if line.startswith("| top 1 ")] == [
        "| top 1 | `model.top_k=1` | 0.68500 ± 0.00707 | -0.02000 | +0.02000 | 2 | 25.0% | 2 |"
    ]
    # of the seed that both have
    assert any("| -0.10000 | +0.10000 | 2 |  | 1 |" in line for line in table)
    assert not any("top 4" in line for line in table)  # not run yet


def test_sizes_are_drawn_where_a_data_set_has_them(
    load, finished, tmp_path: Path, monkeypatch
) -> None:
    ablations, figures = load("accuracy_ablations"), []
    monkeypatch.setattr(ablations.plt, "close", figures.append)
    ablations.plot_sizes(finished.plan, finished.runs, tmp_path / "sizes.png")
    drawn = {(a.get_title(), a.get_xlabel().split()[0]) for a in figures[0].axes if a.get_visible()}
    assert drawn == {("cafe", "model.num_experts"), ("shop", "model.num_layers")}
    assert len(figures[0].axes) == 4
    assert (tmp_path / "sizes.png").stat().st_size > 5000


def test_other_forms_have_the_tuned_experts_of_what_ships(load) -> None:
    plan = load("accuracy_plan").load_plan(SHIPPED)
    composed = load("runs").composed
    forms = [entry for entry in plan.entries if "model=hilomoe_" in str(entry.overrides)]
    assert forms
    for entry in forms:  # conf/tuned goes by the name of the model, so the plan has to say it
        own = composed(entry.overrides).model
        shipped = composed(plan.entry(f"{entry.data}/hilomoe_shipped").overrides).model
        for key in ("num_layers", "num_experts", "query_dropout"):
            assert own[key] == shipped[key], entry.name
