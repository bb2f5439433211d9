"""Statistics of the accuracy runs: over seeds, and of two models seed by seed."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from scipy import stats

#: What all models are compared with: the public architectures, tuned alike.
BASELINES = ("dlrm", "dlrm_cat", "dcn", "dcn_mixture", "projection")


class Comparison(NamedTuple):
    """Two models over the seeds that both have.

    Attributes:
        gain (float): mean difference of the AUC.
        p_value (float): of a paired, two-sided t test; nan below three seeds.
        seeds (int): that both have.
    """

    gain: float
    p_value: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.p_value):
            return f"{self.gain:+.5f}"
        p_value = "< 0.001" if self.p_value < 0.0005 else f"{self.p_value:.3f}"
        return f"{self.gain:+.5f} (p {p_value})"


def newest(runs: pd.DataFrame) -> pd.DataFrame:
    """The seeds of each model's newest configuration, each once; trials all stay."""
    seeds = runs[runs.kind == "seed"]
    last = seeds.groupby(["data", "model"]).config.transform("last")
    kept = seeds[seeds.config == last].drop_duplicates(["data", "model", "seed"], keep="last")
    return runs[(runs.kind != "seed") | runs.index.isin(kept.index)]


def summary(runs: pd.DataFrame, data: str) -> pd.DataFrame:
    """One row a model: its seeds' means and standard deviations, cost, and trials of its tuning."""
    of_data = runs[runs.data == data]
    seeds = of_data[of_data.kind == "seed"].groupby("model")
    trials = of_data[of_data.kind == "trial"].groupby("model").size()
    result = seeds.agg(
        seeds=("seed", "nunique"),
        auc=("test_auc", "mean"),
        sd=("test_auc", "std"),
        logloss=("test_logloss", "mean"),
        logloss_sd=("test_logloss", "std"),
        flops=("flops_per_sample", "mean"),
        parameters=("dense_parameters", "mean"),
    )
    result["trials"] = trials.reindex(result.index).fillna(0).astype(int)
    return result.sort_values("auc", ascending=False)


def cpu_minutes(runs: pd.DataFrame, data: str) -> pd.Series:
    """By model, the median time of its seeds that ran on CPU; none for models without."""
    chosen = runs[(runs.data == data) & (runs.kind == "seed") & (runs.device == "CPU")]
    return chosen.groupby("model").seconds.median() / 60


def is_baseline(model: str) -> bool:
    """Whether it is a public architecture, tuned, or a variant of one: ``dlrm_cat_shipped``."""
    return any(model == name or model.startswith(f"{name}_") for name in BASELINES)


def best_baseline(runs: pd.DataFrame, data: str) -> str | None:
    """The baseline that is best in test, variants included; None before any has run.

    One seed may be a lucky one: those with three seeds go first.
    """
    rows = summary(runs, data)
    # Without loc, the empty list of data without runs would choose columns.
    known = rows.loc[[is_baseline(model) for model in rows.index]]
    tested = known[known.seeds >= 3]
    return next(iter(known.index if tested.empty else tested.index), None)


def compare(
    runs: pd.DataFrame, data: str, model: str, other: str, half: str = "test"
) -> Comparison:
    """AUC of ``model`` against ``other`` on a half of the given valid file, seed by seed."""
    chosen = runs[(runs.data == data) & (runs.kind == "seed")]
    pairs = chosen.pivot_table(index="seed", columns="model", values=f"{half}_auc")
    pairs = pairs[[model, other]].dropna()
    difference = pairs[model] - pairs[other]
    few = len(pairs) < 3
    p_value = float("nan") if few else float(stats.ttest_rel(pairs[model], pairs[other]).pvalue)
    return Comparison(float(difference.mean()), p_value, len(pairs))


def spread(row: pd.Series) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{row.auc:.5f} ± {row.sd:.5f}" if row.seeds > 1 else f"{row.auc:.5f} (one seed)"
