"""The encoder against plain Python that goes row by row."""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import (
    CTRBatch,
    DataConfig,
    DataSource,
    SchemaConfig,
    load_encoder,
    open_data,
)
from torchrec_hilomoe.data.encoder import TabularEncoder
from torchrec_hilomoe.data.files import RawFormat

SCHEMA = {
    "label": "click",
    "dense": [
        "age",
        {"name": "income", "transform": "log", "missing": -1.0},
        {"name": "score", "transform": "standardize"},
    ],
    "categorical": ["city", {"name": "user", "min_count": 3}, {"name": "device", "hash_size": 50}],
    "multi_valued": [
        {"name": "tags", "separator": "|", "min_count": 2, "pooling": "sum"},
        {"name": "words", "separator": " ", "hash_size": 9},
    ],
    "group": "user",
}


def raw_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def maybe(text: str) -> str:
        return "" if rng.random() < 0.1 else text

    return [
        {
            "click": str(rng.randrange(2)),
            "age": maybe(str(rng.randrange(90))),
            "income": maybe(f"{rng.gauss(0, 1000):.2f}"),
            "score": maybe(f"{rng.gauss(5, 2):.3f}"),
            "city": maybe(rng.choice(["Kyïv", "Lagos", "new york", "N/A"])),
            "user": maybe(f"u{int(rng.expovariate(0.03))}"),
            "device": maybe(str(rng.randrange(100))),
            "tags": maybe(
                "|".join(f"t{int(rng.expovariate(0.2))}" for _ in range(rng.randrange(5)))
            ),
            "words": " ".join(rng.choices(["a", "bb", "é", ""], k=rng.randrange(4))),
        }
        for _ in range(count)
    ]


def fnv(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def vocabulary(values: list[str], min_count: int) -> dict[str, int]:
    counts = Counter(value for value in values if value)
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    return {value: i for i, value in enumerate(kept, start=1)}


def hashed(value: str, size: int) -> int:
    return (fnv(value) ^ fnv(value) >> 32) % size + 1 if value else 0


def reference(train: list[dict[str, str]], rows: list[dict[str, str]]) -> list[tuple[Any, ...]]:
    city = vocabulary([row["city"] for row in train], 1)
    user = vocabulary([row["user"] for row in train], 3)
    tags = vocabulary([tag for row in train for tag in row["tags"].split("|")], 2)
    scores = [float(row["score"]) for row in train if row["score"]]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))

    def log(x: float) -> float:
        return math.copysign(math.log1p(abs(x)), x)

    result = []
    for row in rows:
        dense = (
            float(row["age"] or 0),
            log(float(row["income"])) if row["income"] else -1.0,
            (float(row["score"]) - mean) / deviation if row["score"] else 0.0,
        )
        bags = (
            (city.get(row["city"], 0),),
            (user.get(row["user"], 0),),
            (hashed(row["device"], 50),),
            tuple(tags.get(tag, 0) for tag in row["tags"].split("|") if tag),
            tuple(hashed(word, 9) for word in row["words"].split(" ") if word),
        )
        group = fnv(row["user"])
        result.append((float(row["click"]), dense, bags, group - 2**64 * (group >= 2**63)))
    return result


RowsOf = Callable[[CTRBatch], list[tuple[Any, ...]]]


def test_encoding_equals_plain_python(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], rows_of: RowsOf
) -> None:
    train, valid = raw_rows(500, 1), raw_rows(120, 2)
    config = make_config(
        write_csv("train.csv", train),
        SCHEMA,
        valid=str(write_csv("valid.csv", valid)),
        shuffle=False,
    )
    source = open_data(config, rank=0, world_size=1, seed=0)
    for split, rows in (("train", train), ("valid", valid)):
        encoded = [row for batch in source.loader(split) for row in rows_of(batch)]
        for got, expected in zip(encoded, reference(train, rows), strict=True):
            assert got[0] == expected[0]
            assert got[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-6)
            assert got[2:] == expected[2:]
    tags = vocabulary([tag for row in train for tag in row["tags"].split("|")], 2)
    assert {f.name: f.num_embeddings for f in source.features.sparse} == {
        "city": 5,
        "user": len(vocabulary([row["user"] for row in train], 3)) + 1,
        "device": 51,
        "tags": len(tags) + 1,
        "words": 10,
    }
    assert [f.pooling for f in source.features.sparse[3:]] == ["sum", "mean"]
    assert {f.pooling for f in source.features.sparse[:3]} == {"sum"}
    assert source.features.dense == ("age", "income", "score")


def test_a_saved_encoder_is_the_same_encoder(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    config = make_config(write_csv("train.csv", raw_rows(200, 1)), SCHEMA)
    source = open_data(config, rank=0, world_size=1, seed=0)
    source.save(tmp_path / "first")
    first = load_encoder(tmp_path / "first")
    assert isinstance(first, TabularEncoder)
    assert first.features == source.features
    first.save(tmp_path / "second")
    second = load_encoder(tmp_path / "second")
    assert isinstance(second, TabularEncoder)
    assert (second.digest(), second.schema) == (first.digest(), first.schema)
    assert second.moments == first.moments
    assert {n: v.to_pylist() for n, v in second.vocabularies.items()} == {
        n: v.to_pylist() for n, v in first.vocabularies.items()
    }


def test_a_later_day_extends_the_vocabularies(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    def opened(rows: list[dict[str, str]], **changes: str) -> DataSource:
        config = make_config(write_csv("day.csv", rows), SCHEMA, **changes)
        return open_data(config, rank=0, world_size=1, seed=0)

    days = raw_rows(300, 1), [{**row, "city": "Oslo"} for row in raw_rows(80, 2)]
    opened(days[0]).save(tmp_path / "first")
    extended = opened(days[1], vocabularies_from=str(tmp_path / "first"))
    alone, first = opened(days[1]).encoder, load_encoder(tmp_path / "first")
    assert extended.encoder.moments == first.moments != alone.moments
    for name in ("city", "user", "tags"):
        known, new, joined = (
            encoder.vocabulary(name).to_pylist() for encoder in (first, alone, extended.encoder)
        )
        assert joined == known + [value for value in new if value not in known]
    assert extended.encoder.vocabulary("city").to_pylist()[4:] == ["Oslo"]
    again = opened(days[1], vocabularies_from=str(tmp_path / "first"))
    assert again.encoder.digest() == extended.encoder.digest()


def test_columns_that_the_earlier_day_lacks_are_learnt(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    rows = raw_rows(100, 1)
    empty = write_csv("empty.csv", [{**row, "score": ""} for row in rows])  # its mean is not 0
    schema = {**SCHEMA, "categorical": ["city"], "multi_valued": []}
    open_data(make_config(empty, schema), rank=0, world_size=1, seed=0).save(tmp_path / "first")
    path = write_csv("train.csv", rows)
    config = make_config(path, SCHEMA, vocabularies_from=str(tmp_path / "first"))
    plain = make_config(path, SCHEMA)
    digests = {open_data(c, rank=0, world_size=1, seed=0).encoder.digest() for c in (config, plain)}
    assert len(digests) == 1


def test_ids_of_one_column_do_not_pass_for_those_of_the_next() -> None:
    schema = parse_config(SchemaConfig, {"categorical": ["u", "v"]})

    def digest(**vocabularies: list[str]) -> str:
        arrays = {name: pa.array(ids, pa.large_string()) for name, ids in vocabularies.items()}
        return TabularEncoder(schema, RawFormat(), arrays, {}).digest()

    assert digest(u=["0", "1"], v=["0"]) == digest(u=["0", "1"], v=["0"])
    assert digest(u=["0", "1"], v=["0"]) != digest(u=["0"], v=["1", "0"])
    assert digest(u=["0"], v=["1"]) != digest(v=["0"], u=["1"])


def test_a_shared_cache_keeps_encoders_apart(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], rows_of: RowsOf
) -> None:
    def rows(*ids: str) -> list[dict[str, str]]:
        return [{"label": str(i % 2), "u": u, "v": v} for i, (u, v) in enumerate(ids)]

    test = str(write_csv("test.csv", rows("00", "11", "10", "01")))
    encoded = []
    for name, ids in (("a.csv", ("00", "00", "10")), ("b.csv", ("01", "01", "00"))):
        train = write_csv(name, rows(*ids))
        config = make_config(train, {"categorical": ["u", "v"]}, test=test, batch_size=2)
        source = open_data(config, rank=0, world_size=1, seed=0)
        encoded.append([row[2] for batch in source.loader("test") for row in rows_of(batch)])
    assert encoded[0] == [((1,), (1,)), ((2,), (0,)), ((2,), (1,)), ((1,), (0,))]
    assert encoded[1] == [((1,), (2,)), ((0,), (1,)), ((0,), (2,)), ((1,), (1,))]


def test_hashed_columns_alone_need_no_vocabularies(
    write_csv: Callable[..., Path], make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    path = write_csv("train.csv", raw_rows(20, 1))
    schema = {"label": "click", "categorical": [{"name": "user", "hash_size": 7}]}
    source = open_data(make_config(path, schema), rank=0, world_size=1, seed=0)
    source.save(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved").features.sparse[0].num_embeddings == 8


def test_frappe_follows_the_published_protocol(
    shared_data: Path, make_config: Callable[..., DataConfig]
) -> None:
    path = shared_data / "frappe" / "train.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    fields = [name for name in rows[0] if name != "label"]
    assert len(fields) == 10
    source = open_data(make_config(path, {"categorical": fields}), rank=0, world_size=1, seed=0)
    assert {f.name: f.num_embeddings for f in source.features.sparse} == {
        field: len({row[field] for row in rows}) + 1 for field in fields
    }
