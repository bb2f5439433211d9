"""Warm starts on data whose values stand elsewhere in the tables, on one rank and on two."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed as dist

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import load_encoder
from torchrec_hilomoe.errors import CheckpointError, ConfigError
from torchrec_hilomoe.inference import load_for_serving
from torchrec_hilomoe.training import (
    ScoreConfig,
    init_process_group,
    parse_run_config,
    score,
    train,
)
from torchrec_hilomoe.training.tables import table_of

SCHEMA = {
    "label": "clicked",
    "dense": ["price"],
    "categorical": ["user", {"name": "item", "hash_size": 50}],
    "multi_valued": ["tags"],
}
AT_REST = {"learning_rate": 1e-12}  # leaves every weight as it is


def values_of(folder: Path, output: str) -> dict[str, Any]:
    """A run on ``train.csv`` of a folder, at rest where it is not the first one."""
    rate = {} if output == "source" else AT_REST
    return {
        "data": {
            "train": str(folder / ("train.csv" if output == "source" else "later.csv")),
            "valid": str(folder / "valid.csv"),
            "schema": SCHEMA,
            "batch_size": 100,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "name": "hilomoe",
            "embedding_dim": 256,  # two pieces under column-wise sharding
            "expert_width": 20,
            "plain_width": 20,
        },
        "training": {"stages": {"joint": {"batches": 20}}},
        "optimizer": {
            "tables": {**rate, "name": "sgd"},
            "backbone": rate,
            "experts": rate,
            "router": rate,
        },
        "sharding": {"type": "row_wise"},
        "seed": 0,
        "output_dir": str(folder / output),
    }


def started(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """The same, starting from the weights of the first one."""
    checkpoint = {"warm_start": str(folder / "source" / "checkpoints" / "best")}
    return {**values_of(folder, output), "checkpoint": checkpoint, **changes}


def train_and_score(values: dict[str, Any]) -> None:
    """Trains, and writes predictions of the folder's valid rows."""
    train(parse_run_config(values))
    output = Path(values["output_dir"])
    evaluation = {
        "checkpoint": str(output / "checkpoints" / "best"),
        "data": {
            "test": str(output.parent / "valid.csv"),
            "batch_size": 64,
            "cache_dir": values["data"]["cache_dir"],
        },
        "predictions": str(output / "predictions.parquet"),
        "sharding": {},
    }
    score(parse_config(ScoreConfig, evaluation))


def predictions(folder: Path, output: str) -> list[float]:
    return pq.read_table(folder / output / "predictions.parquet")["prediction"].to_pylist()


def user_table(checkpoint: Path) -> torch.Tensor:
    tables = dict(load_for_serving(checkpoint).named_parameters())
    return next(table for name, table in tables.items() if ".t_user." in name)


@pytest.fixture(scope="module")
def folder(device, write_clicks, tmp_path_factory) -> Path:
    """A run, and the clicks after it: other users, most of the old ones at other places."""
    folder = tmp_path_factory.mktemp("warm_start")
    write_clicks(folder / "train.csv", 1000, 0)
    with write_clicks(folder / "drawn.csv", 900, 5).open(newline="") as file:
        header, *rows = csv.reader(file)
    user = header.index("user")
    for row in rows:
        row[user] = {"u3": "new", "u5": "newer"}.get(row[user], row[user])
    for name, part in (("valid.csv", rows[:200]), ("later.csv", rows[200:])):
        with (folder / name).open("w", newline="") as file:
            known = [row for row in part if name == "later.csv" or "new" not in row[user]]
            csv.writer(file).writerows([header, *known])
    train_and_score(values_of(folder, "source"))
    return folder


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise", "table_wise", "data_parallel"])
def test_values_take_their_rows_along(folder, sharding, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "torchrec_hilomoe")
    # The function of the same name hides the module.
    module = sys.modules["torchrec_hilomoe.training.checkpoint.warm_start"]
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)  # several blocks a table, the last one shorter
    name = f"started_{sharding}"
    values = started(folder, name, sharding={"type": sharding})
    if sharding == "data_parallel":
        values["optimizer"]["tables"] = {**AT_REST, "name": "adam", "kernel": "dense"}
    train_and_score(values)
    assert predictions(folder, name) == pytest.approx(predictions(folder, "source"), abs=1e-6)
    assert "t_user: 18 of 20 values are known to the checkpoint" in caplog.text
    assert "t_tags: 9 of 9 values are known to the checkpoint" in caplog.text
    assert "warm start: t_item" not in caplog.text  # hashed alike


def test_new_values_start_as_the_mean_of_the_known(folder):
    train(parse_run_config(started(folder, "started")))
    users = load_encoder(folder / "started" / "checkpoints" / "best" / "encoder").vocabulary("user")
    new = [1 + users.to_pylist().index(user) for user in ("new", "newer")]
    before, after = (
        user_table(folder / name / "checkpoints" / "best") for name in ("source", "started")
    )
    torch.testing.assert_close(after[new], before[1:].mean(0).expand(2, -1))
    assert torch.equal(after[0], before[0])  # unknown values


def test_values_of_the_earlier_day_stay_in_extended_vocabularies(folder):
    values = started(folder, "extended")
    best = folder / "source" / "checkpoints" / "best"
    values["data"]["vocabularies_from"] = str(best / "encoder")
    train(parse_run_config(values))
    before, after = (user_table(path) for path in (best, folder / "extended/checkpoints/best"))
    assert len(after) == len(before) + 2  # u3 and u5 are gone, and two are new
    assert torch.equal(after[: len(before)], before)
    shutil.copytree(best / "encoder", folder / "moved")
    values["data"]["vocabularies_from"] = str(folder / "moved")
    train(parse_run_config(values))  # the same run: what came of it is the same
    del values["data"]["vocabularies_from"]
    with pytest.raises(
        ConfigError, match=r"data\.vocabularies_from \('.*encoder' there, None here\), encoder"
    ):
        train(parse_run_config(values))


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_two_ranks_take_the_rows_of_one(folder, sharding):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    values = json.dumps(started(folder, f"two_ranks_{sharding}", sharding={"type": sharding}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, __file__, values], env=environment, check=True, timeout=180)
    assert predictions(folder, f"two_ranks_{sharding}") == pytest.approx(
        predictions(folder, "source"), abs=1e-6
    )


def test_values_are_new_to_a_table_that_knew_none(folder):
    """It has no mean of values, so that they start as what was unknown to it."""
    rare = {"name": "user", "min_count": 1_000_000}
    values = values_of(folder, "none_known")
    values["data"]["schema"] = {**SCHEMA, "categorical": [rare, *SCHEMA["categorical"][1:]]}
    train(parse_run_config(values))
    best = folder / "none_known" / "checkpoints" / "best"
    checkpoint = {"warm_start": str(best)}
    train(parse_run_config(started(folder, "all_new", checkpoint=checkpoint)))
    before, after = (
        user_table(folder / name / "checkpoints" / "best") for name in ("none_known", "all_new")
    )
    assert (len(before), len(after)) == (1, 21)
    torch.testing.assert_close(after, before.expand(21, -1))


@pytest.mark.parametrize(
    ("model", "problems"),
    [
        (
            {"name": "dlrm_cat", "over_arch_layer_sizes": [6]},
            ["missing: model.over_arch.model.", "unexpected: model.inter_arch.", " there, (6, "],
        ),
        ({"embedding_dim": 128}, ["t_user.weight: (21, 256) there, (21, 128) here"]),
    ],
    ids=["layers", "tables"],
)
def test_weights_that_do_not_fit_are_named_or_left_as_they_are(folder, caplog, model, problems):
    values = started(folder, f"other_{model.get('name', 'width')}")
    values["model"] = {"name": "hilomoe", "embedding_dim": 256, **model}
    with pytest.raises(CheckpointError, match="does not fit the model") as error:
        train(parse_run_config(values))
    values["checkpoint"]["strict"] = False
    train(parse_run_config(values))
    assert "warm start without what does not fit" in caplog.text
    for problem in problems:
        assert problem in str(error.value)
        assert problem in caplog.text
    source, here = (
        user_table(folder / name / "checkpoints" / "best")
        for name in ("source", Path(values["output_dir"]).name)
    )
    assert (here.shape == source.shape) == ("name" in model)
    assert here.isfinite().all()


def test_hashes_of_another_size_are_refused(folder):
    schema = {**SCHEMA, "categorical": ["user", {"name": "item", "hash_size": 40}]}
    values = started(folder, "other_hash")
    values["data"]["schema"] = schema
    with pytest.raises(CheckpointError, match="t_item.*: hash_size 50 there, hash_size 40 here"):
        train(parse_run_config(values))


def test_columns_in_another_order_give_their_tables_alone(folder, caplog):
    """Shapes alone would let each column have the layers' weights of another."""
    values = started(folder, "other_order")
    values["data"]["schema"] = {**SCHEMA, "categorical": [*reversed(SCHEMA["categorical"])]}
    problem = (
        "layers, which know columns by their order: sparse features: user, item, tags (mean) "
        "there, item, user, tags (mean) here"
    )
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        train(parse_run_config(values))
    train(parse_run_config({**values, "checkpoint": {}, "output_dir": str(folder / "cold")}))
    values["checkpoint"]["strict"] = False
    train(parse_run_config(values))
    assert f"warm start without what does not fit: {problem}" in caplog.text
    source, cold, warm = (
        dict(load_for_serving(folder / name / "checkpoints" / "best").named_parameters())
        for name in ("source", "cold", "other_order")
    )
    for name, weights in warm.items():
        if ".t_item." in name:
            assert torch.equal(weights, source[name])
        elif table_of(name) is None:
            assert torch.allclose(weights, cold[name], atol=1e-6)


if __name__ == "__main__":
    init_process_group()
    train_and_score(json.loads(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # gloo may abort on the way out of an interpreter whose work is done
