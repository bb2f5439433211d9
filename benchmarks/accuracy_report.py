"""Tables and plots of the accuracy runs: writes docs/results.md and its images.

python benchmarks/accuracy_report.py
python benchmarks/accuracy_report.py --runs MINE.csv --page MINE.md   # of a plan of yours
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import textalloc
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
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

HERE = Path(__file__).parent
#: Rows of the tables that are no candidates: a part left out, a weight that did worse, forms of a
#: former default.
_WITHOUT = ("no_dot_products", "strong_auxiliary", "two_members_", "one_member_")
#: Style and name of each kind of model in the plot. Twins are hollow and on top: they lie near.
_STYLES: dict[str, tuple[dict[str, Any], str]] = {
    "hilomoe": ({"marker": "D", "color": "tab:blue", "alpha": 0.8}, "HiLoMoE"),
    "twin": (
        {"marker": "^", "color": "tab:orange", "mfc": "none", "ms": 9, "mew": 1.5, "zorder": 3},
        "the same without experts",
    ),
    "baseline": ({"marker": "o", "color": "tab:gray", "alpha": 0.8}, "public architectures"),
}
_LINE = {"color": "tab:green", "lw": 0.8}
_PART = "<!-- {}: written by benchmarks/accuracy_report.py -->\n"
_END = "<!-- end -->\n"
_NEW_PAGE = "\n".join(_PART.format(part) + _END for part in ("results", "health"))


def main() -> None:
    """Reads the command line, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = HERE / "results" / "accuracy.csv"
    parser.add_argument("--runs", type=Path, default=runs, help="CSV of the runs")
    page = HERE.parent / "docs" / "results.md"
    parser.add_argument("--page", type=Path, default=page, help="Markdown, its plots in img beside")
    args = parser.parse_args()
    write_page(args.page, newest(pd.read_csv(args.runs)))


def write_page(page: Path, runs: pd.DataFrame) -> None:
    """Replaces the marked parts of the page, and draws its plots.

    Args:
        page (Path): one that is not there yet gets the tables of models and of experts' health.
        runs (pd.DataFrame): of one configuration for each model.
    """
    plan = load_plan(HERE / "ablations.yaml")
    changes = {entry.model for entry in plan.entries} - {BASE}
    models = runs[~runs.model.isin(changes)]
    images = page.parent / "img"
    plot_frontier(models[~models.model.str.startswith(_WITHOUT)], images / "frontier.png")
    plot_sizes(plan, runs, images / "sizes.png")

    text = page.read_text() if page.exists() else _NEW_PAGE
    text = replaced(text, "bars", bars_table(models))
    text = replaced(text, "results", tables(models), "Test AUC over FLOPs", "frontier")
    text = replaced(text, "health", health_table(models))
    text = replaced(text, "ablations", ablation_tables(plan, runs), "Test AUC over sizes", "sizes")
    page.write_text(text)


def replaced(text: str, part: str, lines: Iterable[str], title: str = "", image: str = "") -> str:
    """The page with one marked part, if it has it, written anew, an image below it."""
    if _PART.format(part) not in text:
        return text
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
    if not names:  # none is tuned yet
        return
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = plt.figure(figsize=(8 * columns, 6 * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(len(names))]
    for axis, data in zip(axes, names, strict=True):
        rows = summary(runs, data)
        costs = rows.flops / 1e3
        for model, row in rows.iterrows():
            axis.errorbar(costs[model], row.auc, row.sd, capsize=2, **style_of(str(model))[0])
        axis.plot(*zip(*_steps(rows), strict=True), **_LINE)
        axis.set(title=data, xscale="log", ylabel="test AUC")
        axis.set_xlabel("kFLOPs a sample (dense part)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.margins(0.15, 0.1)
    for style, kind in _STYLES.values():
        axes[0].plot([], [], ls="", label=kind, **style)
    axes[0].plot([], [], label="best at no more FLOPs", **_LINE)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.draw_without_rendering()  # the layout decides where names have room
    for axis, data in zip(axes, names, strict=True):
        rows = summary(runs, data)
        costs = rows.flops / 1e3
        sd = rows.sd.fillna(0)
        bars = [
            [(cost, low), (cost, high)]
            for cost, low, high in zip(costs, rows.auc - sd, rows.auc + sd, strict=True)
        ]
        lines = [*bars, _steps(rows)]
        textalloc.allocate(
            axis,
            x := costs.tolist(),
            y := rows.auc.tolist(),
            rows.index.tolist(),
            x_scatter=x,
            y_scatter=y,
            x_lines=[[x for x, _ in line] for line in lines],
            y_lines=[[y for _, y in line] for line in lines],
            textsize=8,
            linecolor="gray",
            linewidth=0.5,
            min_distance=0.012,
            margin=0.006,
            nbr_candidates=400,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _steps(rows: pd.DataFrame) -> list[tuple[float, float]]:
    """Corners of the line through the best model at each cost or less."""
    rows = rows.sort_values("flops")
    costs, best = list(rows.flops / 1e3), list(rows.auc.cummax())
    corners = [(costs[0], best[0])]
    for cost, auc in zip(costs[1:], best[1:], strict=True):
        corners += [(cost, corners[-1][1]), (cost, auc)]
    return corners


def style_of(model: str) -> tuple[dict[str, Any], str]:
    """Style and kind of a model."""
    if is_baseline(model):
        return _STYLES["baseline"]
    return _STYLES["twin" if "twin" in model else "hilomoe"]


if __name__ == "__main__":
    main()
