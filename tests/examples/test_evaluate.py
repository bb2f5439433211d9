"""Scoring raw files from a checkpoint, without training data."""

from __future__ import annotations

import csv
import re

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

SCHEMA = (
    "data.schema.label=clicked",
    "data.schema.dense=[{name: price, transform: log}]",
    "data.schema.categorical=[user, item]",
    "data.schema.multi_valued=[tags]",
    "data.schema.group=user",
)


@pytest.fixture(scope="module")
def trained(launch, write_clicks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabular")
    files = {
        split: write_clicks(folder / f"{split}.csv", rows, seed)
        for seed, (split, rows) in enumerate({"train": 3000, "valid": 500, "test": 501}.items())
    }
    run = launch(
        "data=tabular",
        *(f"data.{split}={path}" for split, path in files.items()),
        *SCHEMA,
        "data.batch_size=128",
        "model.num_experts=4",
        f"output_dir={folder / 'out'}",
        ranks=2,
    )
    assert run.result["test"]["samples"] == 501
    files["train"].unlink()
    return run.result, files["test"], folder / "out" / "checkpoints" / "best"


def test_what_the_checkpoint_brings_cannot_be_chosen(launch):
    run = launch("checkpoint=x", "data=frappe", script="evaluate")
    assert "data: cannot be chosen here" in run.stderr
    assert "data.test=FILE" in run.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_scores_a_raw_file(trained, launch, tmp_path, ranks):
    trained_result, test, checkpoint = trained
    output = tmp_path / "scores" / "predictions.parquet"
    result = launch(
        f"checkpoint={checkpoint}",
        f"data.test={test}",
        f"predictions={output}",
        "data.batch_size=64",
        script="evaluate",
        ranks=ranks,
        TORCHREC_HILOMOE_CACHE=str(tmp_path / "cache"),
    ).result
    assert result["samples"] == 501
    for metric in ("auc", "logloss", "gauc"):
        assert result[metric] == pytest.approx(trained_result["test"][metric], abs=1e-5)
    with test.open() as file:
        labels = [int(row["clicked"]) for row in csv.DictReader(file)]
    table = pq.read_table(output)
    assert table["label"].to_pylist() == labels
    assert roc_auc_score(labels, table["prediction"]) == pytest.approx(result["auc"], abs=1e-6)
    assert log_loss(labels, table["prediction"]) == pytest.approx(result["logloss"], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_without_labels_join_the_rows_that_were_not_skipped(
    trained, launch, tmp_path, ranks
):
    _, test, checkpoint = trained
    header, *lines = [line.split(",", 1)[1] for line in test.read_text().splitlines()]
    reference = tmp_path / "reference.parquet"
    overrides = (f"checkpoint={checkpoint}", "data.batch_size=64")
    launch(*overrides, f"data.test={test}", f"predictions={reference}", script="evaluate")
    expected = pq.read_table(reference)["prediction"].to_pylist()
    (tmp_path / "raw").mkdir()
    bad = {0: "x", 130: "cheap,u1,2,t1", 131: "1.5,u1", 500: "x,y,z"}
    for part, start in enumerate((0, 200)):
        rows = [bad.get(i, line) for i, line in enumerate(lines)][start : (200, 501)[part]]
        (tmp_path / "raw" / f"{part}.csv").write_text("\n".join([header, *rows]) + "\n")
    output = tmp_path / "predictions.parquet"
    raw = (*overrides, f"data.test={tmp_path / 'raw'}")
    run = launch(
        *raw, f"predictions={output}", "data.on_bad_row=skip", script="evaluate", ranks=ranks
    )
    assert run.result["samples"] == 501 - len(bad)
    assert run.result["auc"] is run.result["logloss"] is None
    assert "data.test has no labels" in run.stderr
    table = pq.read_table(output)
    good = [row for row in range(501) if row not in bad]
    assert table["row"].to_pylist() == good
    assert table["prediction"].to_pylist() == pytest.approx([expected[i] for i in good], abs=1e-6)
    assert table["label"].null_count == len(good)
    without_file = launch(*raw, "data.on_bad_row=skip", script="evaluate", ranks=ranks)
    assert without_file.code == 1
    for rank in range(ranks):
        message = rf"error on rank {rank}: data\.test=.*raw: has no labels, .*predictions=FILE"
        assert re.search(message, without_file.stderr)


def test_a_multirun_leaves_the_folder_alone_that_it_is_started_in(trained, launch, tmp_path):
    """Such as that of the multirun whose checkpoints are scored, or of data."""
    _, test, checkpoint = trained
    (tmp_path / "multirun.yaml").write_text("of a training")
    run = launch(
        "--multirun",
        f"checkpoint={checkpoint}",
        f"data.test={test}",
        "data.batch_size=64,128",
        script="evaluate",
        cwd=tmp_path,
    )
    assert run.result["samples"] == 501
    assert (tmp_path / "multirun.yaml").read_text() == "of a training"
    assert {path.name for path in tmp_path.iterdir()} == {"multirun.yaml", "outputs"}


def test_no_checkpoint(launch, tmp_path):
    run = launch(f"checkpoint={tmp_path}", "data.test=x.csv", script="evaluate")
    assert run.code == 1
    assert f"checkpoint={tmp_path}: is no checkpoint" in run.stderr
    assert "Traceback" not in run.stderr


def test_plugins_that_are_no_list(launch):
    run = launch("checkpoint=x", "data.test=x.csv", "plugins=my_module", script="evaluate")
    assert run.code == 1
    assert "plugins: a list of module names, such as [my_module]; got 'my_module'" in run.stderr
