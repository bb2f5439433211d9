"""Tables and plots of the accuracy runs: writes docs/results.md and docs/img/frontier.png.

python benchmarks/accuracy_report.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from accuracy_ablations import BASE, ablation_tables, plot_sizes
from accuracy_bars import bars_table
from accuracy_plan import load_plan
from accuracy_stats import (
    best_baseline,
    compare,
    cpu_minutes,
    is_baseline,
    newest,
    spread,
    summary,
)
from adjustText import adjust_text
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

HERE = Path(__file__).parent
#: Rows of the tables that are no candidates: a part left out, a weight that did worse, forms of a
#: former default.
_WITHOUT = ("no_dot_products", "strong_auxiliary", "two_members_", "one_member_")
#: Marker, colour and name of each kind of model in the plot.
_STYLES = {
    "hilomoe": ("D", "tab:blue", "HiLoMoE"),
    "twin": ("^", "tab:orange", "the same without experts"),
    "baseline": ("o", "tab:gray", "public architectures"),
}
_PART = "<!-- {}: written by benchmarks/accuracy_report.py -->\n"
_END = "<!-- end -->\n"


def main() -> None:
    """Replaces the marked parts of the page, and draws the plots."""
    runs = newest(pd.read_csv(HERE / "results" / "accuracy.csv"))
    plan = load_plan(HERE / "ablations.yaml")
    changes = {entry.model for entry in plan.entries} - {BASE}
    models = runs[~runs.model.isin(changes)]
    images = HERE.parent / "docs" / "img"
    plot_frontier(models[~models.model.str.startswith(_WITHOUT)], images / "frontier.png")
    plot_sizes(plan, runs, images / "sizes.png")

    page = HERE.parent / "docs" / "results.md"
    text = page.read_text()
    text = replaced(text, "bars", bars_table(models))
    text = replaced(text, "results", tables(models), "Test AUC over FLOPs", "frontier")
    text = replaced(text, "health", health_table(models))
    text = replaced(text, "ablations", ablation_tables(plan, runs), "Test AUC over sizes", "sizes")
    page.write_text(text)


def replaced(text: str, part: str, lines: Iterable[str], title: str = "", image: str = "") -> str:
    """The page with one marked part written anew, an image below it."""
    before, rest = text.split(_PART.format(part))
    _, after = rest.split(_END, 1)
    written = "\n".join(lines)
    if written and image:
        written += f"\n![{title}](img/{image}.png)\n"
    return before + _PART.format(part) + written + _END + after


def tables(runs: pd.DataFrame) -> Iterable[str]:
    """The page's lines, a table for each data set."""
    for data in runs[runs.kind == "seed"].data.unique():
        rows, minutes = summary(runs, data), cpu_minutes(runs, data)
        best = best_baseline(runs, data)
        yield f"\n### {data}\n"
        yield (
            "| model | test AUC | against best baseline | log loss | kFLOPs "
            "| dense parameters | minutes | seeds, trials |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for model, row in rows.iterrows():
            deviation = f" ± {row.logloss_sd:.4f}" if row.seeds > 1 else ""
            time = f"{minutes[model]:.1f}" if model in minutes else "–"
            yield (
                f"| `{model}` | {spread(row)} | {against(runs, data, model, best)} "
                f"| {row.logloss:.4f}{deviation} | {row.flops / 1e3:,.0f} "
                f"| {row.parameters:,.0f} | {time} | {row.seeds:.0f}, {row.trials:.0f} |"
            )
    yield ""


def health_table(runs: pd.DataFrame) -> Iterable[str]:
    """A line for each model with experts: the worst seed, router and layer."""
    watched = runs[(runs.kind == "seed") & runs.dead_share.notna()]
    watched = watched.sort_values("data", kind="stable")
    if watched.empty:
        return
    yield (
        "\n| data | model | dead experts | entropy of use | entropy of a sample | paths used "
        "| seeds |\n|---|---|---|---|---|---|---|"
    )
    for (data, model), its in watched.groupby(["data", "model"], sort=False):
        yield (
            f"| {data} | `{model}` | {its.dead_share.max():.1%} | {its.usage_entropy.min():.3f} "
            f"| {its.sample_entropy.min():.3f} | {its.path_share.min():.1%} "
            f"| {its.seed.nunique()} |"
        )
    yield ""


def against(runs: pd.DataFrame, data: str, model: str, best: str | None) -> str:
    """The gain over the best baseline, with its p value."""
    if best is None or model == best:
        return "–"
    comparison = compare(runs, data, model, best)
    own = runs[(runs.data == data) & (runs.model == model) & (runs.kind == "seed")].seed.nunique()
    return f"{comparison}" + (f", {comparison.seeds} pairs" if comparison.seeds < own else "")


def plot_frontier(runs: pd.DataFrame, path: Path) -> None:
    """Test AUC over FLOPs, one panel for each data set, and the line that nothing lies above."""
    names = list(runs[runs.kind == "seed"].data.unique())
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = plt.figure(figsize=(7 * columns, 5 * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(len(names))]
    for axis, data in zip(axes, names, strict=True):
        rows = summary(runs, data)
        costs = rows.flops / 1e3
        for model, row in rows.iterrows():
            marker, color, _ = style_of(str(model))
            axis.errorbar(
                row.flops / 1e3, row.auc, row.sd, marker=marker, color=color, capsize=2, alpha=0.8
            )
        best_so_far = rows.auc[costs.sort_values().index].cummax()
        axis.step(costs[best_so_far.index], best_so_far, where="post", color="tab:green", lw=0.8)
        axis.set(title=data, xscale="log", ylabel="test AUC")
        axis.set_xlabel("kFLOPs a sample (dense part)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.margins(0.15, 0.1)
    for marker, color, kind in _STYLES.values():
        axes[0].plot([], [], marker=marker, color=color, ls="", label=kind)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.draw_without_rendering()  # the layout decides where names have room
    for axis, data in zip(axes, names, strict=True):
        rows = summary(runs, data)
        texts = [
            axis.text(row.flops / 1e3, row.auc, model, size=8) for model, row in rows.iterrows()
        ]
        adjust_text(
            texts,
            ax=axis,
            expand=(1.15, 1.4),
            iter_lim=500,  # not a time limit: the same plot on any machine
            arrowprops={"arrowstyle": "-", "color": "gray", "lw": 0.5},
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style_of(model: str) -> tuple[str, str, str]:
    """Marker, colour and kind of a model."""
    if is_baseline(model):
        return _STYLES["baseline"]
    return _STYLES["twin" if "twin" in model else "hilomoe"]


if __name__ == "__main__":
    main()
