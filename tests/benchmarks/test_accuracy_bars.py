from __future__ import annotations

import pytest


@pytest.fixture
def runs():
    import pandas as pd

    aucs = {"dlrm": [0.70, 0.71, 0.72], "dlrm_cat": [0.73, 0.74], "hilomoe": [0.75, 0.76, 0.77]}
    flops = {"dlrm": 1e3, "dlrm_cat": 4e3, "hilomoe": 2e3}
    rows = [
        {"data": "shop", "model": model, "kind": "seed", "seed": seed}
        | {"test_auc": auc, "valid_auc": 1 - auc}
        | {"test_logloss": 0.5, "flops_per_sample": flops[model], "dense_parameters": 10}
        for model, values in aucs.items()
        for seed, auc in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_bar_is_reached_by_gain_and_cost_together(load, runs) -> None:
    accuracy_bars = load("accuracy_bars")
    bars = [
        accuracy_bars.Bar("shop", "hilomoe", "dlrm_cat", 0.019, 0.5),
        accuracy_bars.Bar("shop", "hilomoe", "dlrm_cat", 0.021, 0.5),
        accuracy_bars.Bar("shop", "hilomoe", "dlrm_cat", 0.019, 0.49),
        accuracy_bars.Bar("shop", "hilomoe", None, 0.049, 2.0),
        accuracy_bars.Bar("shop", "hilomoe", "not_run", 0.0, 1.0),
    ]
    lines = list(accuracy_bars.bars_table(runs, bars))[2:-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[8] for line in cells] == ["yes", "**no**", "**no**", "yes", "not run"]
    against = ["`dlrm_cat`"] * 3 + ["`dlrm`, best baseline", "`not_run`"]
    assert [line[2] for line in cells] == against
    assert cells[0][3] == "+0.02000"  # of the two seeds that both have: too few for a test
    assert cells[0][5] == "-0.02000"
    assert [line[6] for line in cells] == ["0.50 ×"] * 3 + ["2.00 ×", ""]
    assert [line[9] for line in cells] == ["2", "2", "2", "3", "0"]


def test_the_best_baseline_has_three_seeds_if_any_has(load, runs) -> None:
    best_baseline = load("accuracy_stats").best_baseline
    assert best_baseline(runs, "shop") == "dlrm"
    assert best_baseline(runs[runs.seed < 2], "shop") == "dlrm_cat"
    assert best_baseline(runs[runs.model == "hilomoe"], "shop") is None


def test_bars_are_of_planned_runs(load) -> None:
    here, load_plan = load("accuracy_runs").HERE, load("accuracy_plan").load_plan
    plans = [load_plan(here / name) for name in ("accuracy.yaml", "ablations.yaml")]
    names = {entry.name for plan in plans for entry in plan.entries}
    for bar in load("accuracy_bars").BARS:
        assert {f"{bar.data}/{bar.model}", f"{bar.data}/{bar.other or 'dlrm'}"} <= names


def test_without_baselines_nothing_is_compared(load, runs) -> None:
    accuracy_bars = load("accuracy_bars")
    bars = [accuracy_bars.Bar("shop", "hilomoe", None, 0.0, 1.0)]
    (line,) = list(accuracy_bars.bars_table(runs[runs.model == "hilomoe"], bars))[2:-1]
    assert "| not run | 0 |" in line


def test_comparisons_read_as_numbers_of_the_page(load) -> None:
    comparison = load("accuracy_stats").Comparison
    written = [str(comparison(0.001, p_value, 3)) for p_value in (0.0004, 0.0006, float("nan"))]
    assert written == ["+0.00100 (p < 0.001)", "+0.00100 (p 0.001)", "+0.00100"]


def test_bars_of_data_without_runs_have_not_run(load, runs) -> None:
    accuracy_bars = load("accuracy_bars")
    bars = [accuracy_bars.Bar("cafe", "hilomoe", other, 0.0, 1.0) for other in (None, "dlrm")]
    lines = list(accuracy_bars.bars_table(runs, bars))[2:-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[2] for line in cells] == ["best baseline", "`dlrm`"]
    assert [line[8] for line in cells] == ["not run", "not run"]
