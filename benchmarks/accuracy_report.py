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
from accuracy_stats import best_baseline, compare, is_baseline, newest, spread, summary
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
#: Rows of the tables that are no candidates: a part left out, or a weight that did worse.
_WITHOUT = ("no_dot_products", "strong_auxiliary")
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
        rows = summary(runs, data)
        best = best_baseline(runs, data)
        yield f"\n### {data}\n"
        yield (
            "| model | test AUC | against best baseline | log loss | kFLOPs "
            "| dense parameters | seeds, trials |"
        )
        yield "|---|---|---|---|---|---|---|"
        for model, row in rows.iterrows():
            yield (
                f"| `{model}` | {spread(row)} | {against(runs, data, model, best)} "
                f"| {row.logloss:.4f} | {row.flops / 1e3:,.0f} | {row.parameters:,.0f} "
                f"| {row.seeds:.0f}, {row.trials:.0f} |"
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
    """Test AUC over FLOPs, one panel for each data set."""
    names = list(runs[runs.kind == "seed"].data.unique())
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = plt.figure(figsize=(6 * columns, 4 * lines), layout="constrained")
    for place, data in enumerate(names, start=1):
        axis = figure.add_subplot(lines, columns, place)
        rows = summary(runs, data)
        for model, row in rows.iterrows():
            style = {"marker": "o" if is_baseline(model) else "D"}
            color = "tab:gray" if is_baseline(model) else "tab:blue"
            axis.errorbar(row.flops / 1e3, row.auc, row.sd, color=color, capsize=2, **style)
        axis.set(title=data, xlabel="kFLOPs a sample (dense part)", ylabel="test AUC")
        axis.margins(0.25, 0.2)
        axis.set_xlim(left=0)
        label_points(axis, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def label_points(axis: Axes, rows: pd.DataFrame) -> None:
    """Names each point beside it, lower where the name of a higher point is in the way."""
    taken: list[tuple[float, float, float]] = []  # left, right and height of the names
    for model, row in rows.iterrows():
        point = (row.flops / 1e3, row.auc)
        x, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
        width = 0.014 * len(str(model))
        x = x + 0.015 if x + width < 1 else x - 0.015 - width
        y += 0.015
        while any(left < x + width and x < end and abs(y - at) < 0.05 for left, end, at in taken):
            y -= 0.01
        taken.append((x, x + width, y))
        axis.annotate(model, point, xytext=(x, y), textcoords="axes fraction", size=8)


if __name__ == "__main__":
    main()
