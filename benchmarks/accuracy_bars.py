"""What was to be reached, and how far the runs are from it: the first table of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from accuracy_stats import best_baseline, compare, summary


class Bar(NamedTuple):
    """A gain that a model was to have over another, at a cost.

    Attributes:
        data (str): the data set.
        model (str): the model as it ships, or a variant of it.
        other (str | None): what it is compared with; None for the best baseline.
        gain (float): least difference of the mean test AUC.
        cost (float): most FLOPs, over the other's.
    """

    data: str
    model: str
    other: str | None
    gain: float
    cost: float


BARS = (
    # against the public architectures
    Bar("frappe_x1", "hilomoe_shipped", "dlrm_cat_published", 0.002, 0.5),
    Bar("frappe_x1", "hilomoe_shipped", None, 0.0, 0.5),
    Bar("ml1m_implicit", "hilomoe_shipped", "dlrm_cat_8_epochs", 0.003, 0.5),
    Bar("ml1m_implicit", "hilomoe_shipped", "dlrm_two_members", 0.003, 0.5),
    Bar("ml1m_implicit", "hilomoe_shipped", None, 0.003, 0.5),
    Bar("ml100k", "hilomoe_shipped", None, 0.002, 0.815),
    Bar("synthetic", "hilomoe_shipped", None, 0.0, 0.815),
    # against the same model without experts, widened to the same FLOPs
    Bar("ml1m_implicit", "hilomoe_shipped", "twin_wide", 0.002, 1.0),
    Bar("frappe_x1", "hilomoe_shipped", "twin_wide", 0.0, 1.0),
    Bar("ml100k", "hilomoe_shipped", "twin_wide", 0.0, 1.0),
    Bar("synthetic", "hilomoe_shipped", "twin_wide", 0.0, 1.0),
    # as good as it, for less
    Bar("ml1m_implicit", "narrow", "twin_wide", 0.0, 0.815),
    Bar("frappe_x1", "narrow", "twin_wide", 0.0, 0.815),
    # L layers of K experts against one layer of L * K
    Bar("synthetic", "hilomoe_shipped", "flat", 0.0, 1.01),
    Bar("ml1m_implicit", "hilomoe_shipped", "flat", 0.0, 1.01),
    Bar("frappe_x1", "hilomoe_shipped", "flat", 0.0, 1.01),
)


def bars_table(runs: pd.DataFrame, bars: Iterable[Bar] = BARS) -> Iterable[str]:
    """The page's lines, one for each bar; those whose models have not run say so."""
    yield "\n| data | model | against | test AUC | bar | on valid | FLOPs | bar | reached | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for bar in bars:
        rows, other = summary(runs, bar.data), bar.other or best_baseline(runs, bar.data)
        gain, on_valid, cost, reached, seeds = "", "", "", "not run", 0
        if bar.model in rows.index and other in rows.index:
            compared = compare(runs, bar.data, bar.model, other)
            ratio = rows.flops[bar.model] / rows.flops[other]
            passed = compared.gain >= bar.gain and ratio <= bar.cost
            gain, cost, seeds = str(compared), f"{ratio:.2f} ×", compared.seeds
            on_valid = str(compare(runs, bar.data, bar.model, other, "valid"))
            reached = "yes" if passed else "**no**"
        named = [f"`{other}`"] if other else []
        against = ", ".join(named if bar.other else [*named, "best baseline"])
        yield (
            f"| {bar.data} | `{bar.model}` | {against} | {gain} | ≥ {bar.gain:+.4f} | {on_valid} "
            f"| {cost} | ≤ {bar.cost:g} × | {reached} | {seeds} |"
        )
    yield ""
