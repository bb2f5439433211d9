from __future__ import annotations

import pyarrow as pa
import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import SchemaConfig, TabularEncoder
from torchrec_hilomoe.data.criteo import CriteoEncoder
from torchrec_hilomoe.data.files import RawFormat
from torchrec_hilomoe.data.matching import matching_rows, other_columns
from torchrec_hilomoe.errors import DataError


def encoder(*users: str, hash_size: int | None = None) -> TabularEncoder:
    column = {"name": "user", "hash_size": hash_size}
    schema = parse_config(SchemaConfig, {"label": "y", "categorical": [column]}, "data.schema")
    vocabularies = {} if hash_size else {"user": pa.array(users, pa.large_string())}
    return TabularEncoder(schema, RawFormat("csv"), vocabularies, {})


def test_every_value_finds_its_row():
    old, new = encoder("ann", "bob", "cid", "dan"), encoder("eve", "dan", "ann", "bob", "fay")
    rows = matching_rows("user", old, new)
    assert rows.tolist() == [0, -1, 4, 1, 2, -1]
    assert matching_rows("user", new, old).tolist() == [0, 3, 4, -1, 2]


def test_nothing_moves_between_equal_vocabularies_and_hashes():
    assert matching_rows("user", encoder("ann", "bob"), encoder("ann", "bob")) is None
    assert matching_rows("user", encoder(hash_size=7), encoder(hash_size=7)) is None
    assert matching_rows("cat_0", CriteoEncoder([5] * 26), CriteoEncoder([5] * 26)) is None


def test_an_empty_vocabulary_knows_nothing():
    assert matching_rows("user", encoder(), encoder("ann")).tolist() == [0, -1]
    assert matching_rows("user", encoder("ann"), encoder()).tolist() == [0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            encoder(hash_size=7),
            encoder(hash_size=9),
            "user: hash_size 7 there, hash_size 9 here",
        ),
        (
            encoder("ann", "bob"),
            encoder(hash_size=2),
            "user: a vocabulary of 2 there, hash_size 2 here",
        ),
    ],
)
def test_rows_that_cannot_be_told_are_refused(old, new, message):
    with pytest.raises(DataError) as error:
        matching_rows("user", old, new)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, []),
        (
            {"dense": ["age", {"name": "price", "transform": "log"}]},
            ["dense columns: price (log), age there, age, price (log) here"],
        ),
        ({"dense": ["price", "age"]}, ["dense columns: price (log), age there, price, age here"]),
        ({"dense": []}, ["dense columns: price (log), age there, none here"]),
        (
            {"multi_valued": [{"name": "tags", "hash_size": 5, "pooling": "sum"}]},
            ["sparse features: user, tags (mean) there, user, tags here"],
        ),
    ],
)
def test_layers_know_columns_by_order_and_meaning(change, problem):
    schema = {
        "dense": [{"name": "price", "transform": "log"}, "age"],
        "categorical": [{"name": "user", "hash_size": 5}],
        "multi_valued": [{"name": "tags", "hash_size": 5}],
    }
    old, new = (
        TabularEncoder(parse_config(SchemaConfig, values), RawFormat(), {}, {})
        for values in (schema, schema | change)
    )
    assert other_columns(old, new) == problem


def test_hashes_of_the_criteo_binaries_are_no_others():
    column = {"name": "cat_0", "hash_size": 4}
    schema = parse_config(SchemaConfig, {"label": "y", "categorical": [column]}, "data.schema")
    with pytest.raises(DataError, match="cat_0: criteo_1tb of 5 rows there, hash_size 4 here"):
        matching_rows(
            "cat_0", CriteoEncoder([5] * 26), TabularEncoder(schema, RawFormat("csv"), {}, {})
        )
