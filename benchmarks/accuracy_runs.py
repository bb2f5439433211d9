"""Runs of the accuracy benchmark: started as users start them, kept in one CSV file."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_plan import Entry
from accuracy_splits import carved, data_of, sampled
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from runs import config_digest

from torchrec_hilomoe.errors import HiLoMoEError

HERE = Path(__file__).parent
COLUMNS = [
    "data",
    "model",
    "kind",
    "seed",
    "overrides",
    "config",
    "valid_auc",
    "test_auc",
    "test_logloss",
    "flops_per_sample",
    "dense_parameters",
    "seconds",
    "dead_share",
    "usage_entropy",
    "sample_entropy",
    "path_share",
    "device",
    "torch",
]


class RunError(Exception):
    """A run ended with an error, or there is no time left for it."""


class RunTable:
    """The finished runs, one CSV line each.

    Args:
        path (Path): created with the first run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def append(self, row: dict[str, object]) -> None:
        """Adds a run, on disk before it returns."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
            self.rows.append({key: str(value) for key, value in row.items()})

    def trials(self, entry: Entry) -> list[tuple[list[str], float]]:
        """Overrides and valid AUC of the tuning runs so far that lie in the entry's space."""
        trials = [
            (json.loads(row["overrides"]), float(row["valid_auc"]))
            for row in self._of(entry, "trial")
        ]
        return [
            (overrides, auc)
            for overrides, auc in trials
            if {key: value for key, _, value in (o.partition("=") for o in overrides)}.keys()
            == entry.space.keys()
            and all(v in entry.space[k] for k, _, v in (o.partition("=") for o in overrides))
        ]

    def best_trial(self, entry: Entry) -> list[str] | None:
        """What tuning chose, by valid AUC; None before any trial."""
        if not entry.space:
            return []
        trials = self.trials(entry)
        return max(trials, key=lambda trial: trial[1])[0] if trials else None

    def seeds(self, entry: Entry, seeds: Sequence[int], chosen: Sequence[str]) -> set[int]:
        """Those of the seeds that are done with these overrides; others are of an earlier plan."""
        own = [row for row in self._of(entry, "seed") if json.loads(row["overrides"]) == chosen]
        return {int(row["seed"]) for row in own} & set(seeds)

    def _of(self, entry: Entry, kind: str) -> list[dict[str, str]]:
        """Rows of an entry that today's configuration would run again just so."""
        own = {"data": entry.data, "model": entry.model, "kind": kind}
        return [
            row
            for row in self.rows
            if own.items() <= row.items()
            and row["config"] == run_digest(entry, kind, json.loads(row["overrides"]))
        ]


class Runner:
    """Starts runs of ``examples/train_dlrm_hilomoe.py``, one thread each.

    Args:
        table (RunTable): where finished runs go.
        root (Path | None): folder of the data files.
        work (Path): scratch folder for outputs and carved splits.
        deadline (float): no run begins after this time of `time.monotonic`.
    """

    def __init__(self, table: RunTable, root: Path | None, work: Path, deadline: float) -> None:
        self.table = table
        self._root = root
        self._work = work
        self._deadline = deadline
        self._carving = threading.Lock()

    def run(self, entry: Entry, kind: str, seed: int, chosen: Sequence[str]) -> float:
        """Trains once and adds the run to the table.

        Args:
            entry (Entry): data and model.
            kind (str): ``trial`` sees valid alone, ``seed`` the test split too.
            seed (int): of initialisation and data order.
            chosen (Sequence[str]): overrides after those of the entry.

        Returns:
            float: valid AUC of the best weights.

        Raises:
            RunError: the run failed; the message has the end of its output.
        """
        if time.monotonic() > self._deadline:
            raise RunError("no time left")
        output = self._work / "runs" / f"{os.getpid()}-{threading.get_ident()}"
        command = [
            sys.executable,
            str(HERE.parent / "examples" / "train_dlrm_hilomoe.py"),
            *entry.overrides,
            *chosen,
            *self._files(entry, with_test=kind == "seed"),
            f"seed={seed}",
            f"output_dir='{output}'",
            "checkpoint.resume=never",
        ]
        # Freed memory stays with the process: glibc would fault large tensors in at each step.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "-1",
            # Where plugins=[routing_variants] is found.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        }
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        shutil.rmtree(output, ignore_errors=True)
        if done.returncode:
            raise RunError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        metrics = json.loads(done.stdout.splitlines()[-1])
        test = metrics.get("test") or {}
        if metrics["valid"]["auc"] is None or (kind == "seed" and test["logloss"] is None):
            raise RunError(f"{' '.join(command)}\nthe predictions are not finite")
        row = {
            "data": entry.data,
            "model": entry.model,
            "kind": kind,
            "seed": seed,
            "overrides": json.dumps(list(chosen)),
            "config": run_digest(entry, kind, chosen),
            "valid_auc": round(metrics["valid"]["auc"], 6),
            "test_auc": round(test["auc"], 6) if kind == "seed" else "",
            "test_logloss": round(test["logloss"], 6) if kind == "seed" else "",
            "flops_per_sample": metrics["dense_flops_per_sample"],
            "dense_parameters": metrics["dense_parameters"],
            "seconds": round(time.monotonic() - began),
            **expert_health(metrics),
            **machine(),
        }
        self.table.append(row)
        print(
            f"{entry.name} {kind} {seed} {' '.join(chosen)}: valid {row['valid_auc']} "
            f"test {row['test_auc']} in {row['seconds']} s",
            flush=True,
        )
        return float(row["valid_auc"])

    def _files(self, entry: Entry, with_test: bool) -> list[str]:
        if not entry.files:
            return []
        if self._root is None:
            raise RunError("--root: required, the folder of the data files of the plan")
        files = {split: str(self._root / entry.files[split]) for split in ("train", "valid")}
        folder, train = self._work / "data", files["train"]
        try:
            with self._carving:
                data = data_of(entry, files)
                halves = carved(data, folder, entry.data)
                if entry.tune_rows and not with_test:
                    train = str(sampled(data, folder, entry.data, entry.tune_rows))
        except (HiLoMoEError, HydraException, OmegaConfBaseException) as error:
            raise RunError(f"the files of {entry.data} cannot be cut: {error}") from error
        # The halves are Parquet, whatever the format of the plan's files.
        given = {"train": train, "valid": halves[0]} | ({"test": halves[1]} if with_test else {})
        # In quotes, since Hydra takes dt=2024-05-01 for no value.
        return [*(f"data.{split}='{path}'" for split, path in given.items()), "data.format=auto"]


def run_digest(entry: Entry, kind: str, chosen: Sequence[str]) -> str:
    """What a run is known by: its configuration, and the sample of train that a trial saw."""
    rows = entry.tune_rows if kind == "trial" else None
    return config_digest((*entry.overrides, *chosen), rows)


def machine() -> dict[str, str]:
    """What the runs here run on: the device, and the release of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__.partition("+")[0]}


def expert_health(metrics: dict[str, Any]) -> dict[str, float]:
    """The worst of all routers and layers after the last stage; nothing without experts.

    Args:
        metrics (dict[str, Any]): what a run prints, see
            :class:`~torchrec_hilomoe.analysis.ExpertHealth`.

    Returns:
        dict[str, float]: the share of dead experts, both entropies, and the share of the possible
        paths that was used, of no more paths than there are samples.
    """
    *_, last = metrics["stages"].values()
    routers = last["experts"].values()
    if not routers:
        return {}
    samples = metrics["valid"]["samples"]
    return {
        "dead_share": max(max(router["dead_share"]) for router in routers),
        "usage_entropy": min(min(router["usage_entropy"]) for router in routers),
        "sample_entropy": min(min(router["sample_entropy"]) for router in routers),
        "path_share": min(
            round(router["paths"] / min(router["possible_paths"], samples), 4) for router in routers
        ),
    }
