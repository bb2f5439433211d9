from __future__ import annotations

import dataclasses
import gzip
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_hilomoe.data import CTRBatch, DataConfig, DataSource, open_data, open_encoded
from torchrec_hilomoe.data import prepare_data as prepare
from torchrec_hilomoe.errors import ConfigError, DataError

RowsOf = Callable[[CTRBatch], list[tuple[Any, ...]]]
MakeConfig = Callable[..., DataConfig]

SCHEMA = {
    "dense": ["price"],
    "categorical": ["user"],
    "multi_valued": ["tags"],
    "group": "user",
}
TABLE = {
    "label": [0, 1, 1, 0, 1, 0, 0, 1],
    "price": [1.5, None, -3.0, 0.0, 2.0, 7.25, None, 1.0],
    "user": [7, 7, 12, 3, None, 12, 7, 100],
    "tags": [["a", "b"], [], ["b"], ["c", "a"], [], ["a"], ["b", "c"], ["a"]],
}


def csv_text(delimiter: str = ",") -> str:
    lines = [delimiter.join(TABLE)]
    for label, price, user, tags in zip(*TABLE.values(), strict=True):
        values = [
            label,
            "" if price is None else price,
            "" if user is None else user,
            "|".join(tags),
        ]
        lines.append(delimiter.join(map(str, values)))
    return "\n".join(lines) + "\n"


def opened(config: DataConfig, **ranks: int) -> DataSource:
    return open_data(config, **{"rank": 0, "world_size": 1, "seed": 0, **ranks})


def encoded(source: DataSource, rows_of: RowsOf, split: str = "train") -> list[tuple[Any, ...]]:
    return [row for batch in source.loader(split) for row in rows_of(batch)]


def test_the_same_rows_in_any_format_are_encoded_alike(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    text = csv_text()
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "t.tsv").write_text(csv_text("\t"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table(TABLE), tmp_path / "t.parquet")
    texts = TABLE | {"tags": ["|".join(tags) for tags in TABLE["tags"]]}
    pq.write_table(pa.table(texts), tmp_path / "texts.parquet")
    header, *lines = text.splitlines(keepends=True)
    for i in range(2):
        path = tmp_path / "folder" / f"part-{i}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(header + "".join(lines[i * 4 : i * 4 + 4]))
    places = ["t.csv", "t.tsv", "t.csv.gz", "t.parquet", "texts.parquet", "folder", "folder/*.csv"]
    results = []
    for place in places:
        source = opened(make_config(tmp_path / place, SCHEMA, shuffle=False))
        results.append((encoded(source, rows_of), source.features))
    assert len(results[0][0]) == 8
    assert all(result == results[0] for result in results)


def test_a_data_set_of_bags_alone(tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf) -> None:
    (tmp_path / "t.csv").write_text("label,tags\n1,a|b\n0,\n1,b\n")
    config = make_config(tmp_path / "t.csv", {"multi_valued": ["tags"]}, shuffle=False)
    source = opened(config)
    assert encoded(source, rows_of) == [
        (1.0, (), ((2, 1),), None),
        (0.0, (), ((),), None),
        (1.0, (), ((1,),), None),
    ]
    dense = next(iter(source.loader("train"))).dense_features
    assert (dense.shape, dense.dtype) == ((3, 0), torch.float32)


def test_worker_processes_read_the_same_cache(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    (tmp_path / "t.csv").write_text(csv_text())
    rows = [
        encoded(opened(make_config(tmp_path / "t.csv", SCHEMA, num_workers=n)), rows_of)
        for n in (0, 2)
    ]
    assert rows[0] == rows[1]


def test_ids_that_train_lacks_are_row_zero(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    (tmp_path / "train.csv").write_text("label,user,tags\n1,a,x|y\n0,b,x\n")
    (tmp_path / "valid.csv").write_text("label,user,tags\n1,b,z|x\n0,zoe,y\n1,,\n")
    schema = {"categorical": ["user"], "multi_valued": ["tags"]}
    config = make_config(tmp_path / "train.csv", schema, valid=str(tmp_path / "valid.csv"))
    ids = [row[2] for row in encoded(opened(config), rows_of, "valid")]
    assert ids == [((2,), (0, 1)), ((0,), (2,)), ((0,), ())]


def test_large_ids_are_known_in_a_file_where_a_gap_made_them_floats(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    ids = [20_000_000_001, 20_000_000_002, 20_000_000_003]
    pq.write_table(pa.table({"label": [1, 0, 1], "user": ids}), tmp_path / "train.parquet")
    # As pandas writes whole numbers of which one is missing.
    gaps = pa.array([*map(float, ids), None])
    pq.write_table(pa.table({"label": [1, 0, 1, 0], "user": gaps}), tmp_path / "valid.parquet")
    config = make_config(
        tmp_path / "train.parquet",
        {"categorical": ["user"]},
        valid=str(tmp_path / "valid.parquet"),
        shuffle=False,
    )
    ids_of_rows = [row[2] for row in encoded(opened(config), rows_of, "valid")]
    assert ids_of_rows == [((1,),), ((2,),), ((3,),), ((0,),)]


def test_a_model_scores_raw_files_without_its_training_data(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    (tmp_path / "train.csv").write_text(csv_text())
    pq.write_table(pa.table(TABLE).slice(2), tmp_path / "test.parquet")
    config = make_config(tmp_path / "train.csv", SCHEMA, test=str(tmp_path / "test.parquet"))
    source = opened(config)
    source.save(tmp_path / "model" / "data")
    (tmp_path / "train.csv").unlink()
    for cache in (config.cache_dir, str(tmp_path / "other cache")):
        scored = open_encoded(
            tmp_path / "model" / "data",
            str(tmp_path / "test.parquet"),
            batch_size=4,
            rank=0,
            world_size=1,
            cache_dir=cache,
        )
        assert scored.features == source.features
        assert encoded(scored, rows_of, "test") == encoded(source, rows_of, "test")
        assert not scored.has_split("train")
        with pytest.raises(ConfigError, match=r"data\.train: required"):
            scored.loader("train")


def test_a_saved_encoder_keeps_the_quotes_of_its_files(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    (tmp_path / "t.tsv").write_text('label\tuser\n1\t"a\n0\tb"\n1\t"b"\n')
    config = make_config(tmp_path / "t.tsv", {"categorical": ["user"]}, quote_char=None)
    opened(config).save(tmp_path / "model")

    def scored() -> list[Any]:
        source = open_encoded(
            tmp_path / "model", str(tmp_path / "t.tsv"), batch_size=3, rank=0, world_size=1
        )
        return [row[2] for row in encoded(source, rows_of, "test")]

    assert scored() == [((1,),), ((3,),), ((2,),)]
    # Settings that do not say have the default, under which a quote joins two rows.
    path = tmp_path / "model" / "encoder.json"
    settings = json.loads(path.read_text())
    del settings["raw_format"]["quote_char"]
    path.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"t\.tsv: row 1 \(lines 2 to 3\): a quote joins lines"):
        scored()


def test_skipped_rows_are_left_out_of_everything_and_reported(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, rows_of: RowsOf
) -> None:
    text = "label,user,x\n1,a,1\n7,bad,1\n0,a,oops\n0,b\n0,c,\n,bad,2\n1,a,3\n"
    (tmp_path / "train.csv").write_text(text)
    schema = {"dense": [{"name": "x", "transform": "standardize"}], "categorical": ["user"]}
    config = make_config(tmp_path / "train.csv", schema, on_bad_row="skip", shuffle=False)
    source = opened(config)
    reasons = {
        "the label is not 0 or 1 (data.schema.positive_threshold takes other numbers)": 2,
        "column 'x' is not a number that float32 holds": 1,
        "wrong number of fields": 1,
    }
    assert source.report["skipped"] == {"train": reasons}
    assert source.report["rows"] == {"train": 3}
    assert "data.train: rows left out: " in caplog.text
    assert [(row[0], row[1], row[2]) for row in encoded(source, rows_of)] == [
        (1.0, (-1.0,), ((1,),)),
        (0.0, (0.0,), ((2,),)),
        (1.0, (1.0,), ((1,),)),
    ]
    assert source.features.sparse[0].num_embeddings == 3
    assert opened(config).report == source.report
    with pytest.raises(DataError, match=r"train\.csv: row \d \(line \d\)"):
        opened(make_config(tmp_path / "train.csv", schema))


def test_encoding_happens_once_for_the_same_content(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    (tmp_path / "a.csv").write_text(csv_text())
    prepare(make_config(tmp_path / "a.csv", SCHEMA))
    cache = tmp_path / "cache"

    def entries() -> list[Path]:
        return sorted([*cache.glob("rows/[!.]*"), *cache.glob("encoders/[!.]*")])

    before = entries()
    assert len(before) == 2
    (tmp_path / "renamed.csv").write_text(csv_text())
    prepare(make_config(tmp_path / "renamed.csv", SCHEMA, batch_size=2, shuffle=False))
    assert entries() == before
    prepare(make_config(tmp_path / "a.csv", {**SCHEMA, "dense": []}))
    assert len(entries()) == 4
    (tmp_path / "a.csv").write_text(csv_text() + "1,2,3,a\n")
    assert opened(make_config(tmp_path / "a.csv", SCHEMA)).report["rows"] == {"train": 9}


def test_the_seed_shuffles_and_epochs_differ(
    tmp_path: Path, make_config: MakeConfig, rows_of: RowsOf
) -> None:
    rows = "".join(f"{i % 2},{i}\n" for i in range(64))
    (tmp_path / "t.csv").write_text("label,user\n" + rows)
    config = make_config(tmp_path / "t.csv", {"categorical": ["user"]}, batch_size=8)

    def order(seed: int, epoch: int) -> list[tuple[Any, ...]]:
        loader = opened(config, seed=seed).loader("train", epoch=epoch)
        return [row for batch in loader for row in rows_of(batch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3
    assert sorted(order(0, 0)) == sorted(order(1, 5))


def test_rows_are_shuffled_within_the_configured_buffer(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    (tmp_path / "t.csv").write_text(
        "label,number,user\n" + "".join(f"0,{i},u\n" for i in range(64))
    )
    schema = {"dense": ["number"], "categorical": ["user"]}
    config = make_config(tmp_path / "t.csv", schema, batch_size=4, shuffle_buffer=8)
    batches = [batch.dense_features.flatten().tolist() for batch in opened(config).loader("train")]
    rows = sum(batches, [])
    assert rows != sorted(rows)
    assert all(sorted(rows[i : i + 8]) == list(range(i, i + 8)) for i in range(0, 64, 8))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_as_many_workers_as_configured_prepare_batches(
    tmp_path: Path, make_config: MakeConfig, split: str
) -> None:
    file = tmp_path / "t.csv"
    file.write_text(csv_text())
    source = opened(make_config(file, SCHEMA, valid=str(file), num_workers=2))
    others = set(multiprocessing.active_children())
    batches = iter(source.loader(split))
    assert len(set(multiprocessing.active_children()) - others) == 2
    assert sum(len(batch.labels) for batch in batches) == 8


def test_the_identity_is_of_what_the_files_hold(tmp_path: Path, make_config: MakeConfig) -> None:
    """Ranks of several hosts compare theirs."""
    text = csv_text()
    texts = {"a": text, "copy": text, "other": text.replace("1.5", "2.5")}
    identities = {}
    for name, content in texts.items():
        (tmp_path / f"{name}.csv").write_text(content)
        identities[name] = opened(make_config(tmp_path / f"{name}.csv", SCHEMA)).identity
    assert identities["a"] == identities["copy"] != identities["other"]
    assert identities["a"]["vocabularies"] == identities["other"]["vocabularies"]


def test_training_rows_that_fill_no_batch_are_reported(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    (tmp_path / "t.csv").write_text("label,user\n" + "0,a\n" * 9)
    config = make_config(tmp_path / "t.csv", {"categorical": ["user"]})
    assert opened(config).report["dropped_per_epoch"] == 1
    assert opened(config, rank=1, world_size=2).report["dropped_per_epoch"] == 1


PREPARE = """
import json, sys
from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, open_data
source = open_data(parse_config(DataConfig, json.loads(sys.argv[1])), rank=0, world_size=1, seed=0)
print(source.report["rows"]["train"])
"""


def test_the_suffix_of_a_cached_file_still_counts(tmp_path: Path, make_config: MakeConfig) -> None:
    schema = {"categorical": ["a,b"]}
    for name in ("t.tsv", "t.csv"):
        (tmp_path / name).write_text("label\ta,b\n1\tx,y\n0\tz,y\n")
    assert opened(make_config(tmp_path / "t.tsv", schema)).report["rows"] == {"train": 2}
    with pytest.raises(DataError, match=r"t\.csv: no column"):
        opened(make_config(tmp_path / "t.csv", schema))


@pytest.mark.slow
def test_processes_that_prepare_at_once_share_the_work(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    lines = "".join(f"{i % 2},{i % 1000},{i % 7}\n" for i in range(200_000))
    (tmp_path / "t.csv").write_text("label,user,x\n" + lines)
    config = make_config(tmp_path / "t.csv", {"dense": ["x"], "categorical": ["user"]})
    command = [sys.executable, "-c", PREPARE, json.dumps(dataclasses.asdict(config))]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == "200000"
    left = {path.name for path in (tmp_path / "cache" / "rows").iterdir()}
    assert len([name for name in left if not name.startswith(".")]) == 1
    assert not [name for name in left if name.endswith(".unfinished")]


def test_progress_is_shown_on_request(
    tmp_path: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(csv_text())
    prepare(make_config(tmp_path / "t.csv", SCHEMA))
    assert capfd.readouterr().err == ""
    prepare(make_config(tmp_path / "t.csv", {**SCHEMA, "dense": []}), progress=True)
    shown = capfd.readouterr().err
    assert "Learning vocabularies of train: 100%" in shown
    assert "Encoding train: 100%" in shown
