"""Side by side: HiLoMoE, its floor, its literal form and TorchRec's interaction archs.

python benchmarks/interaction.py                  # the bars, about two minutes
python benchmarks/interaction.py --quick          # the bars, few repetitions
python benchmarks/interaction.py --sweep --plot docs/img/performance.png --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from bars import Bar, measure_bars
from plots import plot_sweeps
from sweeps import compare_archs, sweep_experts, sweep_layers, sweep_tokens
from timing import keep_freed_memory


def main() -> None:
    """Measures, prints tables and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--plot", type=Path, help="draw the sweeps here (with --sweep)")
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 15")
    parser.add_argument("--sweep", action="store_true", help="sweep L, K, N and compare archs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1: CPU clock)")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    repetitions = 3 if args.quick else 15

    bars, rows = measure_bars(repetitions)
    print_bars(bars)
    print_layers(rows)
    results: dict[str, object] = {
        **{name: bar.value for name, bar in bars.items()},
        "bars": {name: bar._asdict() for name, bar in bars.items()},
        "layers": rows,
        "machine": {
            "torch": torch.__version__,
            "threads": args.threads,
            "repetitions": repetitions,
            "load": os.getloadavg()[0],
        },
    }
    if args.sweep:
        few = max(3, repetitions // 3)
        sweeps = {
            "num_layers": sweep_layers([1, 2, 4, 8, 16, 32], few),
            "num_experts": sweep_experts([4, 8, 16, 32, 64, 128, 256, 512, 1024], few),
            "num_tokens": sweep_tokens([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], few),
            "archs": compare_archs([(2048, 64), (2048, 128), (8192, 64)], 3),
        }
        results["sweeps"] = sweeps
        print_archs(sweeps["archs"])
        if args.plot:
            args.plot.parent.mkdir(parents=True, exist_ok=True)
            plot_sweeps(sweeps, rows, args.plot)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def print_bars(bars: dict[str, Bar]) -> None:
    """One line for each bar."""
    print("| key | medians (quartiles) | minima | bar | of |\n|---|---|---|---|---|")
    for name, bar in bars.items():
        low, high = bar.quartiles
        print(
            f"| `{name}` | {bar.value:.3f} ({low:.3f} to {high:.3f}) | {bar.of_minima:.3f} "
            f"| {bar.bar} | {bar.of} |"
        )


def print_layers(rows: list[dict]) -> None:
    """One line for each size of the layer."""
    print(f"\nfastest product: {rows[0]['best_product_gflops']:.1f} GFLOP/s\n")
    print("| input | L | K | base ms | layer ms | floor ratio | routing | efficiency (base) |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows[1:]:
        base, layer = (row["ms"][case]["median"] for case in ("base", "layer"))
        print(
            f"| {row['input']} | {row['L']} | {row['K']} | {base:.1f} | {layer:.1f} "
            f"| {row['floor_ratio']:.3f} | {row['routing_share']:.3f} "
            f"| {row['gemm_efficiency']:.2f} ({row['base_gemm_efficiency']:.2f}) |"
        )


def print_archs(rows: list[dict]) -> None:
    """Training and inference time of each interaction arch."""
    print("\n| arch | B | D | training ms | inference ms |\n|---|---|---|---|---|")
    for row in rows:
        for name, times in row["ms"].items():
            inference = row["inference_ms"][name]["median"]
            print(f"| {name} | {row['B']} | {row['D']} | {times['median']:.1f} | {inference:.1f} |")


if __name__ == "__main__":
    main()
