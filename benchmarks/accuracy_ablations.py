"""Ablations of the model as it ships: their tables, and its sizes along each axis as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from accuracy_plan import Entry, Plan
from accuracy_stats import compare, spread, summary
from matplotlib import pyplot as plt
from omegaconf import OmegaConf
from runs import composed

#: What every ablation changes one thing of.
BASE = "hilomoe_shipped"


def ablation_tables(plan: Plan, runs: pd.DataFrame) -> Iterator[str]:
    """Lines of the page: for each data set, the changes that were run, in the plan's order."""
    for data, entries in _finished(plan, runs).items():
        rows = summary(runs, data)
        yield f"\n### {data}\n"
        yield (
            "| change | overrides | test AUC | difference | on valid | kFLOPs "
            "| dead experts | seeds |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        base = plan.entry(f"{data}/{BASE}")
        for entry in entries:
            row, own = (
                rows.loc[entry.model],
                [o for o in entry.overrides if o not in base.overrides],
            )
            name, overrides = ("as shipped", "") if entry is base else (entry.model, " ".join(own))
            differences = [
                "" if entry is base else str(compare(runs, data, entry.model, BASE, half))
                for half in ("test", "valid")
            ]
            yield (
                f"| {name} | `{overrides}` | {spread(row)} | {' | '.join(differences)} "
                f"| {row.flops / 1e3:,.0f} | {_dead_share(runs, entry)} | {row.seeds:.0f} |"
            ).replace("| `` |", "| |")
    yield ""


def plot_sizes(plan: Plan, runs: pd.DataFrame, path: Path) -> None:
    """Test AUC over each size that has entries ``KEY=NUMBER``: a row a data set, a panel a key."""
    finished = {data: its for data, its in _finished(plan, runs).items() if _sizes(its)}
    keys = list(dict.fromkeys(key for entries in finished.values() for key in _sizes(entries)))
    if not keys:
        return
    figure, axes = plt.subplots(
        len(finished),
        len(keys),
        figsize=(4 * len(keys), 3.2 * len(finished)),
        squeeze=False,
        layout="constrained",
    )
    for row, (data, entries) in zip(axes, finished.items(), strict=True):
        base, rows = plan.entry(f"{data}/{BASE}"), summary(runs, data)
        for axis, key in zip(row, keys, strict=True):
            if key not in _sizes(entries):
                axis.set_visible(False)
                continue
            shipped = float(OmegaConf.select(composed(base.overrides), key))
            points = sorted([*_sizes(entries)[key], (shipped, BASE)])
            chosen = rows.loc[[model for _, model in points]]
            sizes = [size for size, _ in points]
            axis.errorbar(sizes, chosen.auc, chosen.sd, marker="D", color="tab:blue", capsize=2)
            rising = chosen.auc.diff().shift(-1) > 0  # then the line runs where names stand
            for size, up, (_, its) in zip(sizes, rising, chosen.iterrows(), strict=True):
                label, offset = f"{its.flops / 1e3:,.0f}k", (3, -10 if up else 5)
                axis.annotate(label, (size, its.auc), offset, textcoords="offset points", size=7)
            axis.axvline(shipped, color="tab:gray", linewidth=0.5)
            axis.set(title=data, xlabel=f"{key} (at each point: FLOPs)", ylabel="test AUC")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.margins(x=0.14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dead_share(runs: pd.DataFrame, entry: Entry) -> str:
    """Of the worst seed, router and layer; nothing where there are no experts."""
    its = runs[(runs.data == entry.data) & (runs.model == entry.model) & (runs.kind == "seed")]
    worst = its.dead_share.max()
    return "" if math.isnan(worst) else f"{worst:.1%}"


def _finished(plan: Plan, runs: pd.DataFrame) -> dict[str, list[Entry]]:
    """By data set, the entries with a run; without the model as it ships nothing compares."""
    done = set(runs[runs.kind == "seed"][["data", "model"]].itertuples(index=False, name=None))
    finished: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        if (entry.data, BASE) in done and (entry.data, entry.model) in done:
            finished.setdefault(entry.data, []).append(entry)
    return {data: entries for data, entries in finished.items() if len(entries) > 1}


def _sizes(entries: list[Entry]) -> dict[str, list[tuple[float, str]]]:
    """By key, the sizes of the entries named ``KEY=NUMBER``, and these names."""
    sizes: dict[str, list[tuple[float, str]]] = {}
    for entry in entries:
        key, is_size, number = entry.model.partition("=")
        if is_size:
            sizes.setdefault(key, []).append((float(number), entry.model))
    return sizes
