from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, DataSource, SyntheticOptions, open_data
from torchrec_hilomoe.data.synthetic import bayes_auc, synthetic_files

CONF = Path(__file__).parents[2] / "conf" / "data" / "synthetic.yaml"
SMALL = SyntheticOptions(train_rows=20_000, valid_rows=5_000, test_rows=3_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def opened(cache: Path) -> DataSource:
    values = yaml.safe_load(CONF.read_text()) | {"cache_dir": str(cache)}
    del values["defaults"]  # Hydra's
    config = parse_config(DataConfig, values, "data")
    return open_data(config, rank=0, world_size=1, seed=0)


def test_rows_and_seed_decide_the_data(tmp_path: Path) -> None:
    tables = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = SyntheticOptions(2_000, 100, 100, seed)
        tables.append(pq.read_table(synthetic_files(options, tmp_path / place) / "train.parquet"))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_the_best_auc_is_that_of_the_true_probabilities(cache: Path) -> None:
    folder = synthetic_files(SMALL, cache)
    for split, rows in (("train", 20_000), ("valid", 5_000), ("test", 3_000)):
        table = pq.read_table(folder / f"{split}.parquet")
        assert table.num_rows == rows
        expected = roc_auc_score(table["label"], table["click_probability"])
        assert bayes_auc(folder)[split] == pytest.approx(expected, abs=1e-12)


def test_a_split_of_one_class_has_no_best_auc(tmp_path: Path) -> None:
    folder = synthetic_files(SyntheticOptions(100, 1, 1), tmp_path)
    assert list(bayes_auc(folder)) == ["train"]


def test_probabilities_are_calibrated(cache: Path) -> None:
    table = pq.read_table(synthetic_files(SMALL, cache) / "train.parquet")
    labels, truth = (table[name].to_numpy() for name in ("label", "click_probability"))
    for part in np.array_split(np.argsort(truth), 10):
        error = 4 * np.sqrt((truth[part] * (1 - truth[part])).sum()) / len(part)
        assert labels[part].mean() == pytest.approx(truth[part].mean(), abs=error)


def columns(cache: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(synthetic_files(SMALL, cache) / "train.parquet")
    return {name: table[name].to_numpy() for name in table.column_names if name != "interests"}


def test_the_hierarchy_is_category_brand_product(cache: Path) -> None:
    rows = columns(cache)
    brands = set(zip(rows["product"], rows["brand"], strict=True))
    assert len(brands) == len(set(rows["product"])) == 200
    categories = set(zip(rows["brand"], rows["category"], strict=True))
    assert len(categories) == len(set(rows["brand"])) == 24
    assert np.bincount([category for _, category in categories]).tolist() == [3] * 8


def test_the_category_decides_which_interaction_counts(cache: Path) -> None:
    rows = columns(cache)
    logits = np.log(rows["click_probability"] / (1 - rows["click_probability"]))

    def explained(chosen: np.ndarray) -> float:
        """The share of the variance of the logit within brands that the occasion explains."""
        brand = rows["brand"][chosen]
        cell = (brand * 3 + rows["device"][chosen]) * 8 + rows["hour"][chosen]
        by_brand, by_cell = (group_mean(key, logits[chosen]) for key in (brand, cell))
        return float(np.var(by_cell - by_brand) / np.var(logits[chosen] - by_brand))

    def group_mean(key: np.ndarray, values: np.ndarray) -> np.ndarray:
        return (np.bincount(key, values) / np.maximum(np.bincount(key), 1))[key]

    kinds = [explained(rows["category"] % 4 == kind) for kind in range(4)]
    assert kinds[1] > 3 * max(kinds[0], kinds[2], kinds[3])


def test_the_configured_data_set(cache: Path) -> None:
    source = opened(cache)
    assert source.report["rows"] == {"train": 200_000, "valid": 40_000, "test": 40_000}
    for split in ("valid", "test"):
        best = source.bayes_auc(split)
        assert best is not None
        assert 0.79 < best < 0.82
    names = [feature.name for feature in source.features.sparse]
    assert names == ["user", "product", "brand", "category", "device", "hour", "interests"]
    assert len(source.features.dense) == 4
    sizes = {feature.name: feature.num_embeddings for feature in source.features.sparse}
    assert sizes["user"] == 301  # every user is known, and so is every other entity
    assert sizes["product"] == 201


def test_a_linear_model_learns_part_of_it(cache: Path) -> None:
    source = opened(cache)

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = [], []
        for batch in source.loader(split):
            keys = [f.name for f in source.features.sparse if f.name != "interests"]
            ids.append(np.stack([batch.sparse_features[key].values().numpy() for key in keys], 1))
            labels.append(batch.labels.numpy())
        return np.concatenate(ids), np.concatenate(labels)

    train, clicks = arrays("train")
    valid, truth = arrays("valid")
    encoder = OneHotEncoder(handle_unknown="ignore").fit(train)
    model = LogisticRegression(C=0.5, max_iter=200).fit(encoder.transform(train), clicks)
    auc = roc_auc_score(truth, model.decision_function(encoder.transform(valid)))
    best = source.bayes_auc("valid")
    assert best is not None
    assert 0.70 < auc < best - 0.05
