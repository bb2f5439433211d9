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
  categorical: [{{name: user, hash_size: 10}}, shop]
"""

MODEL = """
defaults: [_base]
name: average
scale: 2.0
"""

PLUGIN = """
from dataclasses import dataclass
from torch import nn
from torchrec_hilomoe import Interaction, InteractionContext, register_interaction

@dataclass
class Options:
    scale: float = 1.0

class Average(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, dense_features, sparse_features):
        return self.scale * (dense_features + sparse_features.mean(dim=1))

@register_interaction("average", Options)
def build(context: InteractionContext, config: Options) -> Interaction:
    return Interaction(Average(config.scale), context.embedding_dim)
"""


def test_own_data_set_and_model(launch, tmp_path):
    (tmp_path / "train.tsv").write_text("bought\tuser\tshop\n" + "1\tann\ta\n0\tbob\tb\n" * 20)
    for group, name, content in (
        ("data", "shop", DATA.format(train=tmp_path / "train.tsv")),
        ("model", "average", MODEL),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(content.lstrip())
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    result = launch(
        "--config-dir",
        str(tmp_path),
        "data=shop",
        "model=average",
        "model.scale=3.0",
        "plugins=[my_plugin]",
        "training=single_stage",
        f"output_dir={tmp_path / 'out'}",
        PYTHONPATH=str(tmp_path),
    ).result
    assert (result["model"], result["data"]) == ("average", "shop")
    assert result["train_batches"] == 3 * 5
    assert result["valid"] is None
