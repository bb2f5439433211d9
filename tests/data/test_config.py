from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig
from torchrec_hilomoe.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf" / "data"
NAMES = [
    "criteo_1tb",
    "criteo_kaggle",
    "frappe",
    "ml100k",
    "ml1m_implicit",
    "movielens100k",
    "synthetic",
    "tabular",
]


def test_all_data_sets_are_there() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_parses_under_its_own_name(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    values = yaml.safe_load(text)
    assert values.pop("defaults", ["tabular"]) == ["tabular"]
    config = parse_config(DataConfig, values, "data")
    assert config.name == name
    assert config.train is None


def test_tabular_yaml_shows_every_tabular_key_with_its_default() -> None:
    values = yaml.safe_load((CONF / "tabular.yaml").read_text())
    assert parse_config(DataConfig, values, "data") == DataConfig()
    all_keys = set(DataConfig.__dataclass_fields__)
    assert set(values) == all_keys - {"synthetic", "hash_sizes"}


def test_bare_names_and_mappings_mean_the_same() -> None:
    bare, mapped = (
        parse_config(DataConfig, {"schema": {key: [entry]}}).schema
        for key, entry in (("categorical", "user"), ("categorical", {"name": "user"}))
    )
    assert bare == mapped
    assert bare.categorical[0].min_count == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 3}, r"data\.batchsize: unknown key; did you mean 'batch_size'"),
        ({"batch_size": 0}, r"data\.batch_size: .*greater than or equal to 1 \(got 0\)"),
        ({"on_bad_row": "ignore"}, r"data\.on_bad_row: .*'raise' or 'skip'"),
        ({"source": "kafka"}, r"data\.source: .*'tabular'"),
        ({"train": 7}, r"data\.train"),
        ({"quote_char": ""}, r"data\.quote_char: expected one ASCII character .* \(got ''\)"),
        ({"quote_char": "\u00ab"}, r"data\.quote_char: expected one ASCII character"),
        ({"delimiter": "\n"}, r"data\.delimiter: expected one ASCII character that is no line"),
        ({"delimiter": "||"}, r"data\.delimiter: expected one ASCII character"),
        ({"quote_char": "|", "delimiter": "|"}, r"data\.quote_char: '\|' is the delimiter"),
        ({"quote_char": ","}, r"data\.quote_char: ',' is the delimiter; .* or null"),
        (
            {"schema": {"dense": [{"name": "x", "transfrom": "log"}]}},
            r"data\.schema\.dense\.0\.transfrom: unknown key; did you mean 'transform'",
        ),
        (
            {"schema": {"multi_valued": [{"name": "x", "pooling": "max"}]}},
            r"data\.schema\.multi_valued\.0\.pooling",
        ),
        (
            {"schema": {"dense": ["x"], "categorical": ["x"]}},
            r"data\.schema: listed more than once: 'x'",
        ),
        ({"schema": {"label": "y", "categorical": ["y"]}}, r"listed more than once: 'y'"),
        (
            {"schema": {"categorical": [{"name": "u", "hash_size": 9, "min_count": 2}]}},
            r"data\.schema\.categorical\.0: column 'u' has both hash_size and min_count",
        ),
        (
            {"schema": {"multi_valued": [{"name": "u", "hash_size": 2**31}]}},
            r"data\.schema\.multi_valued\.0\.hash_size: .*less than 2147483648 \(got 2147483648\)",
        ),
        (
            {"schema": {"dense": [{"name": "x", "missing": float("nan")}]}},
            r"data\.schema\.dense\.0\.missing: .*got nan",
        ),
        ({"schema": {"dense": [{"name": "x", "missing": 1e39}]}}, r"dense\.0\.missing: .*1e\+39"),
        (
            {"schema": {"categorical": [{"name": "u", "min_count": 2**63}]}},
            r"data\.schema\.categorical\.0\.min_count",
        ),
        ({"hash_sizes": [1, 2, 3]}, r"data\.hash_sizes"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(DataConfig, values, "data")


def test_group_may_be_a_feature_and_is_read_once() -> None:
    schema = parse_config(
        DataConfig, {"schema": {"categorical": ["user", "item"], "group": "user"}}
    ).schema
    assert schema.columns == ["label", "user", "item"]
