"""What a user gets for a mistake: one clear error on each rank, and an end."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

HEADER = "label,user,price,genres\n"
GOOD = HEADER + "1,a,0.5,x|y\n0,b,1.5,\n" * 20


def _file(tmp_path, content):
    path = tmp_path / "train.csv"
    path.write_text(content)
    return f"data.train={path}"


TABULAR = (
    "data=tabular",
    "data.schema.categorical=[user]",
    "data.schema.dense=[price]",
    "data.schema.multi_valued=[genres]",
    "data.batch_size=8",
)

CASES = {
    "misspelt key": (
        ["training.max_train_batchs=3"],
        GOOD,
        ["training.max_train_batchs: unknown key; did you mean 'max_train_batches'?", "timeout"],
    ),
    "misspelt added group": (["+modle.x=3"], GOOD, ["modle: unknown key; did you mean 'model'?"]),
    "key of another model": (["model.low_rank_dim=3"], GOOD, ["low_rank_dim: unknown", "top_k"]),
    "misspelt group": (["model=hilomo"], GOOD, ["model/hilomo", "hilomoe_cross"]),
    "wrong value": (["model.num_layers=many"], GOOD, ["model.num_layers", "integer", "'many'"]),
    "wrong choice": (["optimizer.tables.name=adamax"], GOOD, ["optimizer.tables.name", "'adam'"]),
    "batch size": (["data.batch_size=7"], GOOD, ["data.batch_size", "7"]),
    "missing file": (["data.train=nowhere.csv"], GOOD, ["data.train", "nowhere.csv"]),
    "missing column": (["data.schema.dense=[prize]"], GOOD, ["train.csv", "'prize'", "price"]),
    "bad number": (
        [],
        GOOD + "1,a,cheap,x\n",
        ["train.csv", "row 41", "price", "cheap", "on_bad_row"],
    ),
    "bad label": ([], GOOD + "2,a,1,x\n", ["train.csv", "row 41", "label", "2"]),
    "empty file": ([], HEADER, ["train.csv", "no usable row"]),
    "fused adam on cpu": (["optimizer.tables.name=adam"], GOOD, ["optimizer.tables.kernel=dense"]),
    "seed": (["seed=x"], GOOD, ["seed", "'x'"]),
    "null group": (["optimizer=null"], GOOD, ["optimizer=null: expected one of adam_dense"]),
    "null tuned": (["tuned=null"], GOOD, ["frappe_x1_hilomoe", "or ~tuned for none"]),
    "misspelt tuned": (["tuned=frappe"], GOOD, ["tuned=frappe: expected", "frappe_x1_hilomoe"]),
    "two experiments": (
        ["experiment=[frappe_x1,synthetic]"],
        GOOD,
        ["experiment, model: expected one name each", "`defaults: [ONE, OTHER]`"],
    ),
    "no model": (["~model"], GOOD, ["experiment, model: expected one name each"]),
    "no batches for batch norm": (
        ["data.batch_size=2", "model.batch_norm=true"],
        GOOD,
        ["data.batch_size", "model.batch_norm"],
    ),
    "plateau without valid": (["training.schedule.name=plateau"], GOOD, ["data.valid"]),
    "output folder": (["output_dir=/proc/nowhere"], GOOD, ["output_dir", "/proc/nowhere"]),
    "column twice": (["data.schema.multi_valued=[price]"], GOOD, ["more than once: 'price'"]),
    "value for a group": (["checkpoint=x"], GOOD, ["checkpoint: ", "dictionary", "'x'"]),
}


#: One for each place that finds a mistake; what two ranks say differs by the place alone.
ON_TWO_RANKS = {
    "misspelt key",
    "misspelt group",
    "misspelt tuned",
    "batch size",  # which two ranks cannot share
    "missing file",
    "bad number",
    "fused adam on cpu",
    "no batches for batch norm",
    "output folder",
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_clear_on_every_rank(launch, tmp_path, case):
    ranks = 2 if case in ON_TWO_RANKS else 1
    overrides, content, expected = CASES[case]
    run = launch(
        *TABULAR,
        _file(tmp_path, content),
        f"output_dir={tmp_path / 'out'}",
        *overrides,
        ranks=ranks,
        timeout=120,
    )
    assert run.code != 0
    assert "Traceback" not in run.stderr.split("torch.distributed.elastic")[0].split("elastic/")[0]
    own_words = run.stderr.split("\nGiven: ")[0]  # not the overrides, repeated
    for text in expected:
        assert text in own_words
    for rank in range(ranks):
        assert f"error on rank {rank}: " in run.stderr
    assert len(run.stderr.splitlines()) < 80


def test_a_start_that_fails_leaves_no_folder(launch, tmp_path):
    run = launch("model.num_layers=many", f"hydra.run.dir={tmp_path}/${{output_dir}}")
    assert run.code == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["outputs"]


def test_skipped_rows_are_reported(launch, tmp_path):
    run = launch(
        *TABULAR,
        _file(tmp_path, GOOD + "1,a,cheap,x\n"),
        "data.on_bad_row=skip",
        "training=single_stage",
        "training.max_train_batches=2",
        f"output_dir={tmp_path / 'out'}",
    )
    report = run.result["data_report"]
    assert report["rows"]["train"] == 40
    assert sum(report["skipped"]["train"].values()) == 1
