from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchrec_hilomoe.modules import HierarchicalRouter, HiLoMoEConfig
from torchrec_hilomoe.ops import route_reference

CONFIG = HiLoMoEConfig(num_layers=3, num_experts=4)


def test_untied_routes_a_projection_of_the_normalised_input() -> None:
    router = HierarchicalRouter(12, HiLoMoEConfig(3, 4, top_k=2, query_dim=5))
    x = torch.randn(7, 12)
    query = router.query.projection(F.layer_norm(x, (12,)))
    expected = route_reference(query, router.keys, top_k=2)
    assert router.keys.shape == (3, 4, 5)
    torch.testing.assert_close(tuple(router(x)), expected)


def test_tied_routes_the_input_by_the_given_keys() -> None:
    router = HierarchicalRouter(12, HiLoMoEConfig(3, 4, tied_keys=True))
    x, expert_v = torch.randn(7, 12), torch.randn(3, 4, 12)
    assert list(router.parameters()) == []
    torch.testing.assert_close(tuple(router(x, expert_v)), route_reference(x, expert_v))


def test_tied_without_keys_names_the_remedy() -> None:
    router = HierarchicalRouter(12, HiLoMoEConfig(3, 4, tied_keys=True))
    with pytest.raises(ValueError, match=r"router\(x, expert_v\)"):
        router(torch.randn(7, 12))


def test_query_dropout_acts_in_training_alone() -> None:
    router = HierarchicalRouter(12, HiLoMoEConfig(3, 4, query_dropout=0.5))
    x = torch.randn(7, 12)
    assert not torch.equal(router(x).scores, router(x).scores)
    router.eval()
    assert torch.equal(router(x).scores, router(x).scores)


def test_initial_logits_are_of_order_one() -> None:
    torch.manual_seed(0)
    router = HierarchicalRouter(256, HiLoMoEConfig(3, 32))
    assert 0.3 < router(torch.randn(512, 256)).logits[:, 0].std() < 1.5


def test_scores_are_float32_under_autocast() -> None:
    router = HierarchicalRouter(12, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(torch.randn(7, 12))
    assert routing.scores.dtype == routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(7, 3))


def test_keeps_its_routing_in_training_alone() -> None:
    router = HierarchicalRouter(12, CONFIG)
    assert router.routing.scores.shape == router.routing.logits.shape == (0, 3, 4)
    kept = router(torch.randn(7, 12))
    assert router.routing is kept
    router.eval()(torch.randn(5, 12))
    assert router.routing is kept
    assert list(router.buffers()) == []


def test_skip_forgets_the_routing_in_training_alone() -> None:
    router = HierarchicalRouter(12, CONFIG)
    kept = router(torch.randn(7, 12))
    assert router.eval().skip().scores.shape == (0, 3, 4)
    assert router.routing is kept
    router.train().skip()
    assert router.routing.scores.shape == (0, 3, 4)
    assert not router.routing.scores.requires_grad


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_keep_no_routing(clone) -> None:
    router = HierarchicalRouter(12, CONFIG)
    kept = router(torch.randn(7, 12))
    assert clone(router).routing.scores.shape == (0, 3, 4)
    assert router.routing is kept


def test_kept_routing_moves_with_the_module() -> None:
    router = HierarchicalRouter(12, CONFIG)
    router(torch.randn(7, 12))
    router.to("meta")
    assert router.routing.scores.device.type == "meta"
    router.to_empty(device="cpu")
    assert router.routing.scores.device.type == "cpu"
    assert router.routing.scores.shape == (0, 3, 4)


def test_moves_inside_a_model_too() -> None:
    model = nn.Sequential(HierarchicalRouter(12, CONFIG, device=torch.device("meta")))
    model.to_empty(device="cpu")
    assert model[0].routing.logits.device.type == "cpu"
