"""The sweeps as one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]


def plot_sweeps(sweeps: dict[str, Rows], layers: Rows, path: Path) -> None:
    """Draws time over L, K and N, and the share of the best GEMM rate.

    Args:
        sweeps (dict[str, Rows]): results of ``sweep_layers``, ``sweep_experts``, ``sweep_tokens``.
        layers (Rows): the best GEMM rate, then a row for each size of the layer.
        path (Path): PNG to write.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    _lines(axes[0, 0], sweeps["num_layers"], "L", "layers of 8 experts (flat 432, B 4096)")
    _lines(axes[0, 1], sweeps["num_experts"], "K", "experts, top 4 of 3 layers (flat 432, B 2048)")
    _lines(axes[1, 0], sweeps["num_tokens"], "N", "tokens of a sample (D 64, 16384 in all)")
    _roofline(axes[1, 1], layers)
    figure.savefig(path, dpi=110)


def _lines(axis: Axes, rows: Rows, key: str, title: str) -> None:
    """Median time of each case with its quartiles."""
    sizes = [row[key] for row in rows]
    for case in rows[0]["ms"]:
        times = [row["ms"][case] for row in rows]
        axis.plot(sizes, [t["median"] for t in times], marker="o", markersize=4, label=case)
        low, high = ([t[quartile] for t in times] for quartile in ("low", "high"))
        axis.fill_between(sizes, low, high, alpha=0.2)
    axis.set(xscale="log", yscale="log", xlabel=key, ylabel="ms of a training step", title=title)
    axis.set_xscale("log", base=2)
    axis.legend()
    axis.grid(alpha=0.3)


def _roofline(axis: Axes, layers: Rows) -> None:
    """Share of the best GEMM rate that layer and base reach."""
    best, rows = layers[0]["best_product_gflops"], layers[1:]
    names = [f"{row['input'].split(',')[0]}\nL {row['L']}\nK {row['K']}" for row in rows]
    places = range(len(rows))
    axis.bar([p - 0.2 for p in places], [r["gemm_efficiency"] for r in rows], 0.4, label="layer")
    base = [r["base_gemm_efficiency"] for r in rows]
    axis.bar([p + 0.2 for p in places], base, 0.4, label="its base linear")
    axis.set_xticks(list(places), names, fontsize=8)
    axis.set(
        ylabel="share", title=f"of the fastest product's rate, {best:.0f} GFLOP/s", ylim=(0, 1.2)
    )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.legend(loc="upper center", ncols=2)  # above the bars
