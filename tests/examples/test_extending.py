"""A data set and a model of one's own, without touching the project."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow]

DATA = """
defaults: [tabular]
name: shop
train: {train}
batch_size: 8
schema:
  label: bought
  categorical: [{{name: user.id, hash_size: 10}}, shop]
"""

MODEL = """
defaults: [_base]
name: average
scale: 2.0
"""

PLUGIN = """
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


def test_own_data_set_and_model(launch, tmp_path):
    rows = "1\tann\ta\n0\tbob\tb\n" * 20
    (tmp_path / "train.tsv").write_text("bought\tuser.id\tshop\n" + rows)
    for group, name, content in (
        ("data", "shop", DATA.format(train=tmp_path / "train.tsv")),
        ("model", "average", MODEL),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(content.lstrip())
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
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
