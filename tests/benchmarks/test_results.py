"""What benchmarks/results holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_published_runs_are_those_that_would_run_today(load) -> None:
    """Runs that a change of defaults leaves behind move to former.csv; one of each model tells."""
    runs, load_plan = load("accuracy_runs"), load("accuracy_plan").load_plan
    table = runs.RunTable(ROOT / "benchmarks" / "results" / "accuracy.csv")
    planned = {
        (entry.data, entry.model): entry
        for name in ("accuracy", "ablations")
        for entry in load_plan(ROOT / "benchmarks" / f"{name}.yaml").entries
    }
    one_of_each = {(row["data"], row["model"], row["kind"]): row for row in table.rows}
    for row in one_of_each.values():
        entry = planned[row["data"], row["model"]]
        digest = runs.run_digest(entry, row["kind"], json.loads(row["overrides"]))
        assert row["config"] == digest, (entry.name, row["overrides"])
