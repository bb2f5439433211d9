"""Tables and plots of the accuracy runs: writes docs/results.md and docs/img/frontier.png.

python benchmarks/accuracy_report.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

HERE = Path(__file__).parent
#: What all models are compared with: the public architectures, tuned alike.
BASELINES = ("dlrm", "dlrm_cat", "dcn", "dcn_mixture", "projection")
BEGIN, END = "<!-- results: written by benchmarks/accuracy_report.py -->\n", "<!-- end -->\n"


def is_baseline(model: str) -> bool:
    """Whether it is a public architecture, tuned or as published."""
    return model.removesuffix("_published") in BASELINES


class Comparison(NamedTuple):
    """Two models over the seeds that both have.

    Attributes:
        gain (float): mean difference of the test AUC.
        p_value (float): of a paired, two-sided t test; nan below three seeds.
    """

    gain: float
    p_value: float


def main() -> None:
    """Replaces the marked part of the page, and draws the plot."""
    runs = newest(pd.read_csv(HERE / "results" / "accuracy.csv"))
    page = HERE.parent / "docs" / "results.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    plot = "\n![Test AUC over FLOPs](img/frontier.png)\n"
    page.write_text(before + BEGIN + "\n".join(tables(runs)) + plot + END + after)
    plot_frontier(runs, HERE.parent / "docs" / "img" / "frontier.png")


def newest(runs: pd.DataFrame) -> pd.DataFrame:
    """Without seeds that were run again, with other choices; trials all stay."""
    again = runs.duplicated(["data", "model", "seed", "kind"], keep="last")
    return runs[~(again & (runs.kind == "seed"))]


def summary(runs: pd.DataFrame, data: str) -> pd.DataFrame:
    """One row a model: its seeds' mean and standard deviation, cost, and trials of its tuning."""
    of_data = runs[runs.data == data]
    seeds = of_data[of_data.kind == "seed"].groupby("model")
    trials = of_data[of_data.kind == "trial"].groupby("model").size()
    result = seeds.agg(
        seeds=("seed", "nunique"),
        auc=("test_auc", "mean"),
        sd=("test_auc", "std"),
        logloss=("test_logloss", "mean"),
        flops=("flops_per_sample", "mean"),
        parameters=("dense_parameters", "mean"),
    )
    result["trials"] = trials.reindex(result.index).fillna(0).astype(int)
    return result.sort_values("auc", ascending=False)


def compare(runs: pd.DataFrame, data: str, model: str, other: str) -> Comparison:
    """Test AUC of ``model`` against ``other``, seed by seed."""
    chosen = runs[(runs.data == data) & (runs.kind == "seed")]
    pairs = chosen.pivot_table(index="seed", columns="model", values="test_auc")
    pairs = pairs[[model, other]].dropna()
    difference = pairs[model] - pairs[other]
    few = len(pairs) < 3
    p_value = float("nan") if few else float(stats.ttest_rel(pairs[model], pairs[other]).pvalue)
    return Comparison(float(difference.mean()), p_value)


def tables(runs: pd.DataFrame) -> Iterable[str]:
    """The page's lines, a table for each data set."""
    for data in runs[runs.kind == "seed"].data.unique():
        rows = summary(runs, data)
        known = [model for model in rows.index if is_baseline(model)]
        best = known[0] if known else None
        yield f"\n### {data}\n"
        yield (
            "| model | test AUC | against best baseline | log loss | kFLOPs | parameters "
            "| seeds, trials |"
        )
        yield "|---|---|---|---|---|---|---|"
        for model, row in rows.iterrows():
            yield (
                f"| `{model}` | {spread(row)} | {against(runs, data, model, best)} "
                f"| {row.logloss:.4f} | {row.flops / 1e3:,.0f} | {row.parameters:,.0f} "
                f"| {row.seeds:.0f}, {row.trials:.0f} |"
            )
    yield ""


def spread(row: pd.Series) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{row.auc:.5f} ± {row.sd:.5f}" if row.seeds > 1 else f"{row.auc:.5f} (one seed)"


def against(runs: pd.DataFrame, data: str, model: str, best: str | None) -> str:
    """The gain over the best baseline, with its p value."""
    if best is None or model == best:
        return "–"
    gain, p_value = compare(runs, data, model, best)
    return f"{gain:+.5f}" + ("" if math.isnan(p_value) else f" (p {p_value:.3f})")


def plot_frontier(runs: pd.DataFrame, path: Path) -> None:
    """Test AUC over FLOPs, one panel for each data set."""
    names = list(runs[runs.kind == "seed"].data.unique())
    figure, axes = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained"
    )
    for axis, data in zip(axes[0], names, strict=True):
        rows = summary(runs, data)
        for model, row in rows.iterrows():
            style = {"marker": "o" if is_baseline(model) else "D"}
            color = "tab:gray" if is_baseline(model) else "tab:blue"
            axis.errorbar(row.flops / 1e3, row.auc, row.sd, color=color, capsize=2, **style)
            axis.annotate(
                model, (row.flops / 1e3, row.auc), xytext=(4, 4), textcoords="offset points", size=8
            )
        axis.set(title=data, xlabel="kFLOPs a sample (dense part)", ylabel="test AUC")
        axis.margins(0.35, 0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
