from __future__ import annotations

from pathlib import Path

PLAN = """
trials: 0
seeds: [0]
models: {}
data:
  cafe:
    overrides: [data=synthetic]
    variants:
      hilomoe_shipped: {overrides: [model=hilomoe]}
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
      top 1: {overrides: [model=hilomoe, model.top_k=1]}
"""


def test_sizes_are_drawn_where_a_data_set_has_them(load, tmp_path: Path, monkeypatch) -> None:
    import pandas as pd

    (tmp_path / "plan.yaml").write_text(PLAN)
    plan, ablations = (
        load("accuracy_plan").load_plan(tmp_path / "plan.yaml"),
        load("accuracy_ablations"),
    )
    rows = [
        {"data": entry.data, "model": entry.model, "kind": "seed", "seed": 0, "test_auc": 0.7}
        | {"test_logloss": 0.5, "flops_per_sample": 2e3, "dense_parameters": 10}
        for entry in plan.entries
    ]
    figures = []
    monkeypatch.setattr(ablations.plt, "close", figures.append)
    ablations.plot_sizes(plan, pd.DataFrame(rows), tmp_path / "sizes.png")
    drawn = {(a.get_title(), a.get_xlabel().split()[0]) for a in figures[0].axes if a.get_visible()}
    assert drawn == {("cafe", "model.num_experts"), ("shop", "model.num_layers")}
    assert len(figures[0].axes) == 4
