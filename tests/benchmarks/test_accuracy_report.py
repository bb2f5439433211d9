from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats


def test_report_compares_seed_by_seed(load) -> None:
    import pandas as pd

    report, stats_of = load("accuracy_report"), load("accuracy_stats")
    rng = np.random.default_rng(0)
    dlrm, ours = rng.normal(0.8, 0.01, 5), rng.normal(0.81, 0.01, 5)
    rows = [
        {"data": "shop", "model": model, "kind": "seed", "seed": seed, "test_auc": auc}
        | {"valid_auc": auc, "test_logloss": 0.5 + 0.1 * seed, "flops_per_sample": flops}
        | {"dense_parameters": 10, "seconds": 60.0 * seed, "device": device if seed else "H200"}
        for model, aucs, flops, device in (
            ("dlrm", dlrm, 2000.0, "H200"), ("hilomoe", ours, 1000.0, "CPU"),
        )
        for seed, auc in enumerate(aucs)
    ]  # fmt: skip
    runs = pd.DataFrame(rows).sample(frac=1, random_state=0)
    gain, p_value, seeds = stats_of.compare(runs, "shop", "hilomoe", "dlrm")
    assert seeds == 5
    assert gain == pytest.approx((ours - dlrm).mean())
    assert p_value == pytest.approx(stats.ttest_rel(ours, dlrm).pvalue)
    page = "\n".join(report.tables(runs))
    assert f"| `hilomoe` | {ours.mean():.5f} ± {ours.std(ddof=1):.5f} | {gain:+.5f} (p " in page
    # Log loss, FLOPs, parameters, and minutes on CPU: of seeds 1 to 4 and of none.
    assert "| 0.7000 ± 0.1581 | 1 | 10 | 2.5 | 5, 0 |" in page
    assert "| 0.7000 ± 0.1581 | 2 | 10 | – | 5, 0 |" in page


def test_variants_of_public_architectures_are_baselines(load) -> None:
    is_baseline = load("accuracy_stats").is_baseline
    assert all(map(is_baseline, ["dlrm", "dcn_mixture", "dlrm_cat_shipped", "dlrm_two_members"]))
    assert not any(map(is_baseline, ["hilomoe", "twin_wide", "cross_twin", "no_dot_products"]))


def test_report_draws_the_frontier(load, tmp_path: Path) -> None:
    import pandas as pd

    row = {"data": "shop", "model": "dlrm", "kind": "seed", "seed": 0, "test_auc": 0.8}
    row |= {"valid_auc": 0.8, "test_logloss": 0.5, "flops_per_sample": 2e3}
    runs = pd.DataFrame([row | {"dense_parameters": 10, "seconds": 1}])
    load("accuracy_report").plot_frontier(runs, tmp_path / "img" / "frontier.png")
    assert (tmp_path / "img" / "frontier.png").stat().st_size > 5000


def test_report_of_trials_alone_has_no_frontier(load, tmp_path: Path) -> None:
    import pandas as pd

    runs = pd.DataFrame([{"data": "shop", "model": "dlrm", "kind": "trial", "seed": 0}])
    load("accuracy_report").plot_frontier(runs, tmp_path / "frontier.png")
    assert not (tmp_path / "frontier.png").exists()


def test_runs_of_a_plan_of_ones_own_have_their_own_page(
    load, plan, row_of, tmp_path: Path, monkeypatch
) -> None:
    import pandas as pd

    report, page = load("accuracy_report"), tmp_path / "mine.md"
    row = row_of(load("accuracy_plan").load_plan(plan).entry("synthetic/shipped"), "seed", [], 0.6)
    pd.DataFrame([row | {"data": "shop"}]).to_csv(tmp_path / "runs.csv")
    arguments = ["accuracy_report.py", "--runs", tmp_path / "runs.csv", "--page", page]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    report.main()
    first = page.read_text()
    assert "### shop" in first
    assert "| `shipped` |" in first
    assert (tmp_path / "img" / "frontier.png").exists()
    report.main()
    assert page.read_text() == first


def test_help_writes_nothing(load, capsys, monkeypatch) -> None:
    report = load("accuracy_report")
    monkeypatch.setattr("sys.argv", ["accuracy_report.py", "--help"])
    monkeypatch.setattr(report, "newest", None)
    with pytest.raises(SystemExit, match="0"):
        report.main()
    assert "--runs" in capsys.readouterr().out


def test_report_takes_the_newest_run_of_a_seed(load, plan, row_of) -> None:
    import pandas as pd

    entry = load("accuracy_plan").load_plan(plan).entry("synthetic/shipped")
    rows = [row_of(entry, kind, [], auc) for kind in ("trial", "seed") for auc in (0.6, 0.7)]
    newest = load("accuracy_stats").newest
    assert newest(pd.DataFrame(rows)).valid_auc.tolist() == [0.6, 0.7, 0.7]
    # No mean is of two configurations.
    rows.append(row_of(entry, "seed", ["model.dropout=0.1"], 0.8) | {"seed": 1})
    assert newest(pd.DataFrame(rows)).valid_auc.tolist() == [0.6, 0.7, 0.8]
