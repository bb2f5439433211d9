"""A data set and a model of one's own, as the README has them, without touching the project."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

pytestmark = [pytest.mark.slow]

README = (Path(__file__).parents[2] / "README.md").read_text()
(DATA,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
(PLUGIN,) = re.findall(
    r"```python\n((?:(?!```).)*register_interaction.*?)```", README, flags=re.DOTALL
)
MODEL = """
defaults: [_base]
name: average
scale: 1.0
"""

DOTTED = """
defaults: [tabular]
name: shop
train: {train}
batch_size: 8
schema:
  label: bought
  categorical: [{{name: user.id, hash_size: 10}}, shop]
"""

WITH_ENUM = """
from dataclasses import dataclass
from enum import Enum
from torch import nn
from torchrec_hilomoe import Interaction, InteractionContext, register_interaction

class Pooling(Enum):
    MEAN = "mean"
    SUM = "sum"

@dataclass
class Options:
    scale: float = 1.0
    pooling: Pooling = Pooling.MEAN

class Average(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, dense_features, sparse_features):
        pool = sparse_features.mean if self.options.pooling is Pooling.MEAN else sparse_features.sum
        return self.options.scale * (dense_features + pool(dim=1))

@register_interaction("average", Options)
def build(context: InteractionContext, config: Options) -> Interaction:
    return Interaction(Average(config), context.embedding_dim)
"""


def _write_clicks(path: Path) -> None:
    draw = random.Random(0)
    clicks = [
        {
            "bought": draw.randrange(2),
            "price": draw.random(),
            "user": f"user {draw.randrange(5)}",
            "query": draw.choice(("shoes", "coat")),
            "url": f"/{draw.randrange(50)}",
            "tags": draw.choice((None, "red", "red,new")),
        }
        for _ in range(40)
    ]
    parquet.write_table(pa.Table.from_pylist(clicks), path)


def test_own_data_set_and_model(launch, tmp_path):
    for group, name, content in (("data", "shop", DATA), ("model", "average", MODEL)):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(content.lstrip())
    (tmp_path / "my_module.py").write_text(PLUGIN)
    for split in ("train-0", "train-1", "valid"):
        _write_clicks(tmp_path / f"{split}.parquet")
    result = launch(
        "--config-dir",
        str(tmp_path),
        "data=shop",
        f"data.train={tmp_path}/train-*.parquet",
        f"data.valid={tmp_path}/valid.parquet",
        "data.batch_size=8",
        "model=average",
        "model.scale=3.0",
        "plugins=[my_module]",
        "training=single_stage",
        f"output_dir={tmp_path / 'out'}",
        PYTHONPATH=str(tmp_path),
    ).result
    assert (result["model"], result["data"]) == ("average", "shop")
    assert result["data_report"]["rows"] == {"train": 80, "valid": 40}
    assert result["train_batches"] == 3 * 10
    assert 0 < result["valid"]["gauc"] < 1


@pytest.mark.parametrize(
    ("name", "flags"),
    [("model/hilomoe", ()), ("training/_base", ()), ("config", ("--config-name", "config"))],
)
def test_a_file_that_a_shipped_one_hides_is_refused(launch, small, tmp_path, name, flags):
    """Hydra would take the shipped file without a word."""
    own = tmp_path / f"{name}.yaml"
    own.parent.mkdir(exist_ok=True)
    own.write_text("seed: 1\n")
    run = launch("--config-dir", str(tmp_path), *flags, *small, "training.max_train_batches=1")
    assert run.code == 1
    assert f"error on rank 0: {own}: would not be read, since the shipped " in run.stderr


def test_an_experiment_of_ones_own_has_tuned_settings_by_its_name(launch, tmp_path):
    for name, content in (
        ("experiment/own", "# @package _global_\ndefaults: [{override /tuned: frappe_x1_hilomoe}]"),
        ("experiment/shop", "# @package _global_\ndefaults: [synthetic]"),
        ("tuned/shop_hilomoe", "# @package model\ndefaults: [frappe_x1_hilomoe]"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(content)
    refused = launch("--config-dir", str(tmp_path), "experiment=own")
    assert "tuned: an experiment cannot override it; give tuned=NAME" in refused.stderr
    composed = launch("--config-dir", str(tmp_path), "--cfg", "job", "experiment=shop")
    assert "ensemble_size: 2" in composed.stdout


def test_columns_with_dots_and_options_that_json_does_not_know(launch, tmp_path):
    rows = "1\tann\ta\n0\tbob\tb\n" * 20
    (tmp_path / "train.tsv").write_text("bought\tuser.id\tshop\n" + rows)
    for group, name, content in (
        ("data", "shop", DOTTED.format(train=tmp_path / "train.tsv")),
        ("model", "average", MODEL),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(content.lstrip())
    (tmp_path / "my_plugin.py").write_text(WITH_ENUM)
    run = (
        "--config-dir",
        str(tmp_path),
        "data=shop",
        "model=average",
        "model.scale=3.0",
        "+model.pooling=sum",
        "plugins=[my_plugin]",
        "training=single_stage",
        f"output_dir={tmp_path / 'out'}",
    )
    result = launch(*run, PYTHONPATH=str(tmp_path)).result
    assert (result["model"], result["data"]) == ("average", "shop")
    assert result["train_batches"] == 3 * 5
    assert result["valid"] is None
    # What the last checkpoint says of model and run is read back.
    again = launch(*run, PYTHONPATH=str(tmp_path)).result
    assert again["train_batches"] == result["train_batches"]
    scored = launch(
        f"checkpoint={tmp_path / 'out' / 'checkpoints' / 'last'}",
        f"data.test={tmp_path / 'train.tsv'}",
        "plugins=[my_plugin]",
        script="evaluate",
        PYTHONPATH=str(tmp_path),
    ).result
    assert scored["samples"] == 40
