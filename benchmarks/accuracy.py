"""Accuracy at a cost: every model tuned alike, then five seeds; goes on when started again.

python benchmarks/accuracy.py --root DIR          # what benchmarks/accuracy.yaml plans, with the
                                                  # data below DIR
python benchmarks/accuracy.py --only frappe_x1/dlrm_cat synthetic/hilomoe --jobs 2 --minutes 60
python benchmarks/accuracy.py --dry-run           # what is left to do
python benchmarks/accuracy_report.py              # docs/results.md and its plots, from the runs

Every finished run is a line of ``benchmarks/results/accuracy.csv``, and is never run again. Tuning
sees the valid split alone; the split called test here is carved from the valid file, and scored
once a run, after tuning.

In a plan of yours ``hydra.searchpath=[file:///FOLDER]`` among the overrides is what
``--config-dir FOLDER`` is to a training. Paths are looked for from where you start it.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
from accuracy_plan import Entry, Plan, load_plan
from accuracy_runs import RunError, Runner, RunTable

HERE = Path(__file__).parent


def main() -> None:
    """Runs what is planned and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "accuracy.yaml", help="YAML")
    runs = HERE / "results" / "accuracy.csv"
    parser.add_argument("--runs", type=Path, default=runs, help="CSV that finished runs go to")
    parser.add_argument("--root", type=Path, help="folder of the plan's data files")
    parser.add_argument("--work", type=Path, default=Path("outputs/accuracy"), help="scratch")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of DATA/MODEL")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after")
    parser.add_argument("--dry-run", action="store_true", help="say what is left, run nothing")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    plan, table = load_plan(args.plan), RunTable(args.runs)
    entries = [
        entry
        for entry in plan.entries
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in args.only)
    ]
    for entry in entries:
        print(f"{entry.name}: {remaining(plan, entry, table)} of {planned(plan, entry)} runs left")
    if args.dry_run:
        return
    runner = Runner(table, args.root, args.work, time.monotonic() + 60 * args.minutes)
    # Variants wait for the tuning of their model, so they come last.
    for tuned_here in (True, False):
        with ThreadPoolExecutor(args.jobs) as pool:
            chosen = [entry for entry in entries if (entry.of is None) == tuned_here]
            list(pool.map(lambda entry: finish(plan, entry, runner), chosen))


def planned(plan: Plan, entry: Entry) -> int:
    """Runs of an entry: trials, if it is tuned, and seeds."""
    return planned_trials(plan, entry) + len(plan.seeds)


def planned_trials(plan: Plan, entry: Entry) -> int:
    """Trials of an entry's tuning, no more than there are choices."""
    combinations = math.prod(len(values) for values in entry.space.values())
    return min(plan.trials, combinations) if entry.space else 0


def remaining(plan: Plan, entry: Entry, table: RunTable) -> int:
    """Planned runs that the table does not hold."""
    done = min(planned_trials(plan, entry), len(table.trials(entry)))
    chosen = choices(plan, entry, table)
    seeds = 0 if chosen is None else len(table.seeds(entry, plan.seeds, chosen))
    return planned(plan, entry) - done - seeds


def choices(plan: Plan, entry: Entry, table: RunTable) -> list[str] | None:
    """What tuning chose, and the variant's changes; None until tuning has all its trials."""
    tuned = entry if entry.of is None else plan.entry(entry.of)
    if len(table.trials(tuned)) < planned_trials(plan, tuned):
        return None
    return [*table.best_trial(tuned), *entry.variant]


def finish(plan: Plan, entry: Entry, runner: Runner) -> None:
    """Tunes an entry, then trains it with every seed; a failed run ends the entry alone."""
    try:
        if entry.space:
            tune(plan, entry, runner)
        chosen = choices(plan, entry, runner.table)
        if chosen is None:
            print(f"{entry.name}: left out until {entry.of} is tuned", flush=True)
            return
        for seed in plan.seeds:
            if seed not in runner.table.seeds(entry, plan.seeds, chosen):
                runner.run(entry, "seed", seed, chosen)
    except RunError as failure:
        print(f"{entry.name}: {failure}", flush=True)


def tune(plan: Plan, entry: Entry, runner: Runner) -> None:
    """Optuna on the valid AUC of one seed, the same study however often it is stopped.

    It is asked anew from the beginning, and told what the table knows; all else is run.
    """
    space = {
        key: optuna.distributions.CategoricalDistribution(choices)
        for key, choices in entry.space.items()
    }
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=plan.trials // 2)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    known = {tuple(sorted(overrides)): value for overrides, value in runner.table.trials(entry)}
    while len(known) < planned_trials(plan, entry):
        trial = study.ask(space)
        overrides = sorted(f"{key}={value}" for key, value in trial.params.items())
        if tuple(overrides) not in known:  # with few choices Optuna proposes some again
            known[tuple(overrides)] = runner.run(entry, "trial", 0, overrides)
        study.tell(trial, known[tuple(overrides)])


if __name__ == "__main__":
    main()
