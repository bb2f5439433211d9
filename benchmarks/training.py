"""End to end: every model through the same pipeline, stage by stage, and the loader alone.

python benchmarks/training.py                       # one rank, on generated data
torchrun --standalone --nproc_per_node=2 benchmarks/training.py --json FILE
python benchmarks/training.py --models hilomoe,dlrm_cat data=ml100k data.train=... data.valid=...
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import torch
from runs import model_names, run_config
from stage_runs import describe, encoding_rate, loader_rate, stage_runs, take_turns
from timing import Times
from torch import distributed as dist

from torchrec_hilomoe.data import open_data
from torchrec_hilomoe.training import init_process_group, is_main_rank, shutdown

Cases = dict[tuple[str, str], dict[str, object]]


def main() -> None:
    """Measures, prints tables and writes what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--models", help="names of conf/model, by commas; all by default")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 5 steps, not 9 of 20")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torchrec(\.|$)|torch\.distributed")
    device = init_process_group()
    torch.set_num_threads(1)
    rounds, steps = (2, 5) if args.quick else (9, 20)

    names = args.models.split(",") if args.models else model_names()
    configs = {name: run_config(name, args.overrides) for name in names}
    config = configs[names[0]].data
    data = open_data(config, rank=dist.get_rank(), world_size=dist.get_world_size(), seed=0)
    runs = stage_runs(configs, data, device)
    wall, cpu = take_turns(runs, rounds, steps)
    loading = loader_rate(data, rounds)
    rows = data.report["rows"]["train"]
    parquet = encoding_rate(config, rows) if is_main_rank() else None
    cases = {case: describe(run, steps) for case, run in runs.items()}

    # One rank on CPU does nothing but compute: its CPU clock leaves other work out.
    by_cpu = dist.get_world_size() == 1 and device.type == "cpu"
    times, loader_rows = (cpu, loading.cpu) if by_cpu else (wall, loading.wall)
    for case, row in cases.items():
        row["samples_per_second"] = round(config.batch_size / times.median(case))
    results = {
        **named_ratios(times, cases, loader_rows),
        "cases": {f"{model}/{stage}": row for (model, stage), row in cases.items()},
        "wall_ms": {"/".join(case): value for case, value in wall.summary().items()},
        "cpu_ms": {"/".join(case): value for case, value in cpu.summary().items()},
        "loader_rows_per_second": loader_rows,
        "encoded_rows_per_second": parquet,
        "run": {
            "data": config.name,
            "batch_size": config.batch_size,
            "ranks": dist.get_world_size(),
            "clock": "CPU" if by_cpu else "wall",
            "device": str(device),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        },
    }
    if is_main_rank():
        print_results(results, times, cases)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    del runs
    shutdown()


def named_ratios(times: Times, cases: Cases, loader_rows: float) -> dict[str, object]:
    """The bars, as far as the models at hand have them, with quartiles."""
    pairs = {
        "stage2_over_stage3_step": (("hilomoe", "specialise"), ("hilomoe", "joint")),
        "hilomoe_over_dlrm_cat_step": (("hilomoe", "joint"), ("dlrm_cat", "joint")),
    }
    ratios: dict[str, object] = {}
    for key, (case, over) in pairs.items():
        if case in cases and over in cases:
            ratios[key] = times.ratio(case, over)
            ratios[f"{key}_quartiles"] = times.ratio_quartiles(case, over)
    fastest = max(row["samples_per_second"] for row in cases.values())
    ratios["loader_over_training"] = loader_rows / fastest
    return ratios


def print_results(results: dict[str, object], times: Times, cases: Cases) -> None:
    """The bars, and one line for each stage of each model."""
    run = results["run"]
    print(
        f"{run['data']}, batch {run['batch_size']}, {run['ranks']} rank(s), {run['clock']} time\n"
    )
    bars = {
        "stage2_over_stage3_step": "<= 0.75",
        "hilomoe_over_dlrm_cat_step": "<= 0.85",
        "loader_over_training": ">= 5",
    }
    print("| key | value (quartiles) | bar |\n|---|---|---|")
    for key, bar in bars.items():
        if key in results:
            quartiles = results.get(f"{key}_quartiles")
            spread = f" ({quartiles[0]:.3f} to {quartiles[1]:.3f})" if quartiles else ""
            print(f"| `{key}` | {results[key]:.3f}{spread} | {bar} |")
    encoded = results["encoded_rows_per_second"]
    print(f"\nloader alone: {results['loader_rows_per_second']:,.0f} rows/s", end="")
    print(f"; raw files to its cache: {encoded:,.0f} rows/s\n" if encoded else "\n")
    print("| model, stage | samples/s | ms a step | data | lookup | communication | dense", end="")
    print(" | optimizer | state MB | step's peak MB |\n|" + "---|" * 10)
    parts = ("data", "lookup", "communication", "dense", "optimizer")
    for case, row in cases.items():
        shares = " | ".join(f"{row['time_share'][part]:.2f}" for part in parts)
        print(
            f"| {', '.join(case)} | {row['samples_per_second']:,} | {1e3 * times.median(case):.1f} "
            f"| {shares} | {row['state_mb']} | {row['step_peak_mb']} |"
        )


if __name__ == "__main__":
    main()
