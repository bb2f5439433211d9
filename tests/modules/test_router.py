from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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


def test_projects_keys_in_training_without_dropout() -> None:
    router, x = HierarchicalRouter(40, HiLoMoEConfig(1, 4, query_dim=32)), torch.randn(64, 40)
    by_query = HierarchicalRouter(40, HiLoMoEConfig(1, 4, query_dim=32, recompute=True))
    by_query.load_state_dict(router.state_dict())
    torch.testing.assert_close(tuple(router(x)), tuple(by_query(x)))
    assert count_flops(router, x) < 0.5 * count_flops(by_query, x)
    with_dropout = HierarchicalRouter(40, HiLoMoEConfig(1, 4, query_dim=32, query_dropout=0.5))
    for not_projected in (with_dropout, router.eval()):
        assert count_flops(not_projected, x) == count_flops(by_query, x)


def test_projected_keys_compile_and_stay_exact_under_autocast() -> None:
    torch.compiler.reset()
    router, x = HierarchicalRouter(40, HiLoMoEConfig(1, 4, query_dim=32)), torch.randn(64, 40)
    expected = tuple(router(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, routing = router.query(x).float(), router(x)
    torch.testing.assert_close(tuple(routing), route_reference(query, router.keys))
    router.compile(fullgraph=True, backend="aot_eager")
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
    with pytest.raises(ValueError, match="no weights of its own"):
        router.weights()


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


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_of_a_compiled_router_have_their_own_weights(clone) -> None:
    router, x = HierarchicalRouter(12, CONFIG), torch.randn(7, 12)
    router.compile(backend="eager")
    expected = router(x)
    other = clone(router)
    torch.testing.assert_close(other(x), expected)
    nn.init.zeros_(other.keys)
    torch.testing.assert_close(other(x).scores, torch.full((7, 3, 4), 0.25))


def test_kept_routing_moves_with_the_module() -> None:
    router = HierarchicalRouter(12, CONFIG)
    router(torch.randn(7, 12))
    router.to("meta")
    assert router.routing.scores.device.type == "meta"
    router.to_empty(device="cpu")
    assert router.routing.scores.device.type == "cpu"
    assert router.routing.scores.shape == (0, 3, 4)


def test_parameters_may_leave_meta_one_by_one() -> None:
    """As TorchRec's DMP and ``assign=True`` let them."""
    with torch.device("meta"):
        router = HierarchicalRouter(16, HiLoMoEConfig())
    router.load_state_dict(HierarchicalRouter(16, HiLoMoEConfig()).state_dict(), assign=True)
    assert router.to("cpu")(torch.randn(5, 16)).scores.device.type == "cpu"
    assert router.skip().scores.device.type == "cpu"


def test_moves_inside_a_model_too() -> None:
    model = nn.Sequential(HierarchicalRouter(12, CONFIG, device=torch.device("meta")))
    model.to_empty(device="cpu")
    assert model[0].routing.logits.device.type == "cpu"


@pytest.mark.parametrize(("in_features", "query_dim"), [(12, 12), (64, 64), (400, 64)])
def test_default_query_is_narrow(in_features, query_dim) -> None:
    router = HierarchicalRouter(in_features, CONFIG)
    assert router.keys.shape == (3, 4, query_dim)
    assert router.query.projection.out_features == query_dim


def count_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    def addmm_flops(added, left, right, **kwargs) -> int:
        return 2 * left[0] * left[1] * right[1]

    mapping = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        module(*inputs)
    return counter.get_total_flops()


def _in_place(router: HierarchicalRouter) -> None:
    router.keys.mul_(3.0)


def _load(router: HierarchicalRouter) -> None:
    router.load_state_dict(HierarchicalRouter(12, CONFIG).state_dict())


def _new_data(router: HierarchicalRouter) -> None:
    router.keys.data = torch.randn(3, 4, 12)


def _replaced(router: HierarchicalRouter) -> None:
    router.keys = nn.Parameter(torch.randn(3, 4, 12))


def _through_data(router: HierarchicalRouter) -> None:
    router.keys.data.mul_(3.0)


@pytest.mark.parametrize("change", [_in_place, _load, _new_data, _replaced, _through_data])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_follows_the_keys(change, mode) -> None:
    router, x = HierarchicalRouter(12, CONFIG).eval(), torch.randn(7, 12)
    with mode():
        router(x)
    with torch.no_grad():
        change(router)
        expected = route_reference(router.query(x), router.keys)
        torch.testing.assert_close(tuple(router(x)), expected)
    with mode():
        torch.testing.assert_close(tuple(router(x)), expected)
        torch.testing.assert_close(tuple(copy.deepcopy(router)(x)), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_follows_steps_of_an_optimizer(fused) -> None:
    """Fused steps, like collectives and writes to shared memory, do not change keys._version."""
    router, x = HierarchicalRouter(12, CONFIG).eval(), torch.randn(7, 12)
    optimizer = torch.optim.Adam(router.parameters(), lr=1.0, fused=fused)
    router(x).scores.square().sum().backward()
    for _ in range(3):
        with torch.no_grad():
            expected = route_reference(router.query(x), router.keys)
            torch.testing.assert_close(tuple(router(x)), expected)
        optimizer.step()


def test_traced_in_evaluation_follows_the_keys() -> None:
    router, x = HierarchicalRouter(12, CONFIG).eval(), torch.randn(7, 12)
    with torch.no_grad():
        router(x)
        traced = torch.fx.symbolic_trace(router)
        router.keys.mul_(3.0)
        torch.testing.assert_close(traced(x).scores, router(x).scores)
