"""FLOPs against the multiply-adds counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_hilomoe.analysis import dense_cost
from torchrec_hilomoe.models import build_model, parse_model_config
from torchrec_hilomoe.modules import set_experts_enabled


def _model(**values):
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=10, num_embeddings=7, feature_names=[f"f{i}"]
        )
        for i in range(10)
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    return build_model(parse_model_config({"embedding_dim": 10, **values}), collection, 0)


def test_published_dlrm_cat():
    model = _model(name="dlrm_cat", over_arch_layer_sizes=[400, 400, 400], batch_norm=True)
    cost = dense_cost(model, 0)
    assert cost.parameters == 364_001  # as published for Frappe_x1
    assert cost.flops_per_sample == 2 * (100 * 400 + 400 * 400 + 400 * 400 + 400)


def test_hilomoe_counts_experts_and_routing():
    d, o, num_layers, k = 100, 400, 3, 32
    cost = dense_cost(
        _model(name="hilomoe_wide", out_features=o, num_layers=num_layers, num_experts=k), 0, 4096
    )
    base, head = d * o, o
    experts = num_layers * k * (d + o)
    query_dim = 64
    query, logits = d * query_dim, num_layers * k * query_dim
    updates = (num_layers - 1) * k * query_dim  # of the query: its space is cheaper here
    expected = 2 * (base + head + experts + query + logits + updates)
    assert cost.flops_per_sample == pytest.approx(expected)


def test_gathered_experts_are_counted():
    d, o, num_layers, k, top_k = 100, 400, 2, 64, 2
    cost = dense_cost(
        _model(
            name="hilomoe_wide",
            out_features=o,
            num_layers=num_layers,
            num_experts=k,
            top_k=top_k,
            query_dim=16,
        ),
        0,
        4096,
    )
    experts = num_layers * top_k * (d + o)  # only the kept ones
    routing = d * 16 + num_layers * k * 16 + (num_layers - 1) * top_k * 16
    base, head = d * o, o
    assert cost.flops_per_sample == pytest.approx(2 * (base + head + experts + routing), rel=0.01)


def test_experts_that_are_disabled_cost_nothing():
    model = _model(name="hilomoe_wide", out_features=50)
    with_experts = dense_cost(model, 0)
    set_experts_enabled(model, False)
    cost = dense_cost(model, 0)
    assert cost == (100 * 50 + 50 + 50 + 1, 2 * (100 * 50 + 50))
    assert with_experts.parameters > cost.parameters


def test_one_disabled_layer_of_several_costs_its_experts_alone():
    model = _model(name="hilomoe_mlp", layer_sizes=[50, 20], num_layers=3, num_experts=4)
    before = dense_cost(model, 0)
    model.inter_arch.tower.linears[1].experts_enabled = False
    after = dense_cost(model, 0)
    assert before.parameters - after.parameters == 3 * 4 * (50 + 20)
    assert before.flops_per_sample - after.flops_per_sample == 2 * 3 * 4 * (50 + 20)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_cost_does_not_depend_on_the_dtype(num_dense):
    tables = [EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=4, feature_names=["f"])]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = build_model(parse_model_config({"embedding_dim": 8}), collection, num_dense)
    assert dense_cost(model.bfloat16(), num_dense) == dense_cost(model.float(), num_dense)


class _Positions(nn.Module):
    """As TorchRec's InteractionArch, it keeps a tensor that is no buffer."""

    def __init__(self, **broken: bool) -> None:
        super().__init__()
        self.linear, self.positions = nn.Linear(100, 5), torch.ones(100)
        self.broken, self.last, self.modes = broken, None, []

    def forward(self, dense_features, sparse_features):
        x = torch.cat((dense_features.unsqueeze(1), sparse_features), 1).flatten(1) * self.positions
        self.modes.append(self.training)
        if self.broken and (x == 0).all():
            raise RuntimeError("zeros")
        self.last = self.linear(x)  # of a graph that cannot be copied
        return self.last


def test_modules_that_meta_does_not_suit_are_counted_where_they_are():
    model = _model(name="dlrm_cat", over_arch_layer_sizes=[])
    model.inter_arch, model.over_arch = _Positions(), nn.Linear(5, 1)
    for _ in range(2):
        assert dense_cost(model, 0) == (500 + 5 + 5 + 1, 2 * (500 + 5))
        model.inter_arch(torch.ones(2, 10), torch.ones(2, 9, 10))
    assert model.inter_arch.training
    assert model.inter_arch.modes == [False, True] * 2


def test_a_forward_pass_that_fails_costs_the_flops_alone(caplog):
    model = _model(name="dlrm_cat", over_arch_layer_sizes=[])
    model.inter_arch, model.over_arch = _Positions(fails=True), nn.Linear(5, 1)
    assert dense_cost(model, 0) == (500 + 5 + 5 + 1, None)
    assert "FLOPs are not counted" in caplog.text
    assert model.inter_arch.training
