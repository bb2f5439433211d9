from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from pyarrow import parquet


def test_table_counts_only_trials_within_the_space(load, plan, tmp_path: Path, row_of) -> None:
    entry = load("accuracy_plan").load_plan(plan).entries[0]
    table = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    for dropout, sizes, auc in (("0.0", "[4]", 0.6), ("0.2", "[4,4]", 0.7), ("0.2", "[9]", 0.9)):
        overrides = [f"model.dropout={dropout}", f"model.over_arch_layer_sizes={sizes}"]
        table.append(row_of(entry, "trial", overrides, auc))
    again = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    assert [auc for _, auc in again.trials(entry)] == [0.6, 0.7]
    assert again.best_trial(entry) == ["model.dropout=0.2", "model.over_arch_layer_sizes=[4,4]"]


def test_trials_on_a_sample_of_another_size_do_not_count(load, tmp_path: Path, row_of) -> None:
    space = {"model.dropout": ["0.0"]}
    entry = load("accuracy_plan").Entry("shop", "dlrm", {}, [], space, tune_rows=30)
    table = load("accuracy_runs").RunTable(tmp_path / "runs.csv")
    table.append(row_of(entry, "trial", ["model.dropout=0.0"], 0.6))
    table.append(row_of(entry, "seed", [], 0.6))
    assert len(table.trials(entry)) == 1
    for other in (replace(entry, tune_rows=60), replace(entry, tune_rows=None)):
        assert not table.trials(other)
        assert table.seeds(other, [0], []) == {0}  # on all rows, whatever tuning sees


def parsed(overrides: list[str]) -> dict[str, object]:
    found = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group: str(override.value()) for override in found}


def test_paths_are_overrides_whatever_their_names(load, tmp_path: Path) -> None:
    day = tmp_path / "dt=2024-05-01 (new)"
    day.mkdir()
    (day / "rows.csv").write_text("label,user\n1,2\n0,3\n")
    runs, path = load("accuracy_runs"), f"{day.name}/rows.csv"
    entry = load("accuracy_plan").Entry("shop", "m", {"train": path, "valid": path}, [])
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), tmp_path, day, float("inf"))
    given = parsed(runner._files(entry, with_test=True))
    assert given["data.train"] == str(day / "rows.csv")
    assert all(Path(given[f"data.{half}"]).is_file() for half in ("valid", "test"))


def test_tuning_sees_a_sample_and_no_test_rows(load, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.csv").write_text("label,user\n" + "1,2\n0,3\n" * 40)
    runs, files = load("accuracy_runs"), {"train": "train.csv", "valid": "valid.csv"}
    entry = load("accuracy_plan").Entry("shop", "m", files, [], tune_rows=30)
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), tmp_path, tmp_path, float("inf"))
    tuning, seed = (parsed(runner._files(entry, with_test)) for with_test in (False, True))
    assert parquet.read_table(tuning["data.train"]).num_rows == 30
    assert set(tuning) == {"data.train", "data.valid", "data.format"}
    assert seed["data.train"] == str(tmp_path / "train.csv")
    assert set(seed) == {*tuning, "data.test"}


def test_a_run_of_predictions_that_are_not_finite_is_no_row(load, plan, tmp_path, monkeypatch):
    runs, entry = load("accuracy_runs"), load("accuracy_plan").load_plan(plan).entries[0]
    table = runs.RunTable(tmp_path / "runs.csv")
    runner = runs.Runner(table, None, tmp_path, math.inf)
    metrics = {"valid": {"auc": 0.7}, "test": {"auc": None, "logloss": None}}
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(metrics), stderr="")
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(runs.RunError, match="not finite"):
        runner.run(entry, "seed", 0, [])
    assert not table.rows


def test_runs_start_where_the_benchmark_was_started(load, tmp_path: Path, monkeypatch) -> None:
    runs, entry = load("accuracy_runs"), load("accuracy_plan").Entry("shop", "m", {}, [])
    runner = runs.Runner(runs.RunTable(tmp_path / "r.csv"), None, Path("work"), math.inf)
    commands = []

    def fail(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append((command, options.get("cwd")))
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="")

    monkeypatch.chdir(tmp_path)  # where plugins of one's own are, and no examples
    monkeypatch.setattr(runs.subprocess, "run", fail)
    with pytest.raises(runs.RunError):
        runner.run(entry, "trial", 0, [])
    ((command, folder),) = commands
    assert Path(command[1]).is_file()
    assert folder is None


def test_health_is_the_worst_after_the_last_stage(load) -> None:
    import pandas as pd

    def router(dead: list[float], paths: int) -> dict:
        entropies = {"usage_entropy": [0.9, 0.8], "sample_entropy": [0.5, 0.6]}
        return {"dead_share": dead, **entropies, "paths": paths, "possible_paths": 64}

    last = {"a": router([0.0, 0.25], 32), "b": router([0.0, 0.0], 8)}
    metrics = {"valid": {"samples": 16}, "stages": {"first": {"experts": {}}}}
    expert_health = load("accuracy_runs").expert_health
    assert expert_health(metrics) == {}
    metrics["stages"]["last"] = {"experts": last}
    worst = {"dead_share": 0.25, "usage_entropy": 0.8, "sample_entropy": 0.5, "path_share": 0.5}
    assert expert_health(metrics) == worst
    run = {"data": "shop", "kind": "seed", "seed": 0}
    runs = pd.DataFrame([run | {"model": "hilomoe"} | worst, run | {"model": "dlrm"}])
    table = list(load("accuracy_report").health_table(runs))
    assert table[1:-1] == ["| shop | `hilomoe` | 25.0% | 0.800 | 0.500 | 50.0% | 1 |"]
    assert not list(load("accuracy_report").health_table(runs[runs.model == "dlrm"]))
    later = [run | {"data": data, "model": "flat"} | worst for data in ("cafe", "shop")]
    table = load("accuracy_report").health_table(pd.concat([runs, pd.DataFrame(later)]))
    of_data = [line.split(" | ")[0] for line in list(table)[1:-1]]
    assert of_data == ["| cafe", "| shop", "| shop"]
