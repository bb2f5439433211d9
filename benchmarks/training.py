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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from runs import model_names, run_config
from stage_runs import describe, encoding_rate, loader_rate, stage_runs, take_turns
from timing import Times
from torch import distributed as dist

from torchrec_hilomoe.data import open_data
from torchrec_hilomoe.training import RunConfig, init_process_group, is_main_rank, shutdown

Results = dict[str, Any]
BARS = {
    "stage2_over_stage3_step": "<= 0.75",
    "hilomoe_over_dlrm_cat_step": "<= 0.85",
    "loader_over_training": ">= 5",
}


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
    names = args.models.split(",") if args.models else model_names()
    configs = {name: run_config(name, args.overrides) for name in names}
    results = measure(configs, device, *((2, 5) if args.quick else (9, 20)))
    if is_main_rank():
        print_results(results)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    shutdown()


def measure(
    configs: Mapping[str, RunConfig], device: torch.device, rounds: int, steps: int
) -> Results:
    """Everything that is measured; every rank of the launch calls it.

    Args:
        configs (Mapping[str, RunConfig]): by model; they differ in the model alone.
        device (torch.device): this rank's device.
        rounds (int): turns of each stage of each model.
        steps (int): steps that count in each turn.

    Returns:
        Results: the content of the JSON file.
    """
    config = next(iter(configs.values())).data
    world_size = dist.get_world_size()
    data = open_data(config, rank=dist.get_rank(), world_size=world_size, seed=0)
    runs = stage_runs(configs, data, device)
    wall, cpu = take_turns(runs, rounds, steps)
    loading = loader_rate(data, rounds)
    encoding = encoding_rate(config, data.report["rows"]["train"]) if is_main_rank() else None
    cases = {case: describe(run, steps) for case, run in runs.items()}

    # One rank on CPU does nothing but compute: its CPU clock leaves other work out, but would
    # leave out that of its loader's processes, too.
    by_cpu = world_size == 1 and device.type == "cpu" and not config.num_workers
    times, loader_rows = (cpu, loading.cpu) if by_cpu else (wall, loading.wall)
    for case, row in cases.items():
        row["ms"] = round(1e3 * times.median(case), 2)
        row["samples_per_second"] = round(config.batch_size / times.median(case))
    return {
        **named_ratios(times, cpu),
        "loader_over_training": loader_rows
        / max(row["samples_per_second"] for row in cases.values()),
        "cases": {"/".join(case): row for case, row in cases.items()},
        "wall_ms": {"/".join(case): value for case, value in wall.summary().items()},
        "cpu_ms": {"/".join(case): value for case, value in cpu.summary().items()},
        "loader_rows_per_second": loader_rows,
        "encoded_rows_per_second": encoding,
        "run": {
            "data": config.name,
            "batch_size": config.batch_size,
            "ranks": world_size,
            "clock": "CPU" if by_cpu else "wall",
            "device": str(device),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        },
    }


def named_ratios(times: Times, cpu: Times) -> Results:
    """The ratios of steps, as far as the models at hand have them; with quartiles and CPU time."""
    pairs = {
        "stage2_over_stage3_step": (("hilomoe", "specialise"), ("hilomoe", "joint")),
        "hilomoe_over_dlrm_cat_step": (("hilomoe", "joint"), ("dlrm_cat", "joint")),
    }
    ratios: Results = {}
    for key, (case, over) in pairs.items():
        if case in times.cases and over in times.cases:
            ratios[key] = times.ratio(case, over)
            ratios[f"{key}_quartiles"] = times.ratio_quartiles(case, over)
            ratios[f"{key}_cpu"] = cpu.ratio(case, over)
    return ratios


def print_results(results: Results) -> None:
    """The bars, and one line for each stage of each model."""
    run = results["run"]
    print(f"{run['data']}, batch {run['batch_size']}, {run['ranks']} rank(s), by {run['clock']}\n")
    print("| key | value (quartiles) | by CPU time | bar |\n|---|---|---|---|")
    for key, bar in BARS.items():
        if key in results:
            low, high = results.get(f"{key}_quartiles", (results[key], results[key]))
            by_cpu = results.get(f"{key}_cpu", results[key])
            print(f"| `{key}` | {results[key]:.3f} ({low:.3f} to {high:.3f}) ", end="")
            print(f"| {by_cpu:.3f} | {bar} |")
    encoded = results["encoded_rows_per_second"]
    print(f"\nloader alone: {results['loader_rows_per_second']:,.0f} rows/s", end="")
    print(f"; raw files to its cache: {encoded:,.0f} rows/s\n" if encoded else "\n")
    parts = ("data", "lookup", "communication", "dense", "optimizer")
    print(f"| model/stage | samples/s | ms a step | {' | '.join(parts)} ", end="")
    print("| state MB | step's peak MB |\n|" + "---|" * 10)
    for case, row in results["cases"].items():
        shares = " | ".join(f"{row['time_share'][part]:.2f}" for part in parts)
        print(
            f"| {case} | {row['samples_per_second']:,} | {row['ms']:.1f} | {shares} "
            f"| {row['state_mb']} | {row['step_peak_mb']} |"
        )


if __name__ == "__main__":
    main()
