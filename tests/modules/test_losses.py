from __future__ import annotations

import copy

import pytest
import torch
import torchrec.fx
from torch import Tensor, nn

from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HiLoMoEConfig,
    HiLoMoELinear,
    HiLoMoEMLP,
    Routing,
    expert_diversity_loss,
    load_balance_loss,
    z_loss,
)
from torchrec_hilomoe.ops import route


def random_routing(batch: int = 50, top_k: int | None = None) -> Routing:
    torch.manual_seed(batch)
    query, keys = torch.randn(batch, 8), torch.randn(3, 4, 8)
    return Routing(*route(query.requires_grad_(), keys, top_k))


def one_hot_routing(experts: list[int], num_experts: int) -> Routing:
    scores = nn.functional.one_hot(torch.tensor(experts), num_experts).float()
    scores = scores.unsqueeze(1).repeat(1, 2, 1)
    return Routing(scores, torch.zeros_like(scores))


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_load_balance_formula(top_k) -> None:
    scores, logits = random_routing(top_k=top_k)
    expected = 0.0
    for layer in range(3):
        kept = 1 if top_k in (None, 4) else top_k  # all kept is dense routing
        chosen = scores[:, layer].topk(kept).indices
        for expert in range(4):
            f = (chosen == expert).sum().item() / (50 * kept)
            expected += 4 * f * scores[:, layer, expert].mean().item()
    actual = load_balance_loss(Routing(scores, logits), top_k)
    torch.testing.assert_close(actual.item(), expected, rtol=1e-5, atol=0.0)


def test_load_balance_extremes() -> None:
    layers, experts = 2, 4
    balanced = one_hot_routing([0, 1, 2, 3], experts)
    collapsed = one_hot_routing([2, 2, 2, 2], experts)
    uniform = Routing(torch.full((6, 2, 4), 0.25), torch.zeros(6, 2, 4))
    for routing, expected in [(balanced, layers), (uniform, layers), (collapsed, layers * experts)]:
        for top_k in (None, 1):
            torch.testing.assert_close(
                load_balance_loss(routing, top_k), torch.tensor(expected * 1.0)
            )


def test_load_balance_has_the_digits_of_its_scores() -> None:
    uniform = torch.full((7, 1, 3), 1 / 3, dtype=torch.float64)
    assert abs(load_balance_loss(Routing(uniform, uniform)).item() - 1.0) < 1e-14


def test_load_balance_gradient_lowers_crowded_experts() -> None:
    logits = torch.zeros(8, 1, 4, requires_grad=True)
    scores = (logits + torch.tensor([1.0, 0.0, 0.0, 0.0])).softmax(-1)
    load_balance_loss(Routing(scores, logits)).backward()
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 1:] < 0).all()


def test_dispatch_share_carries_no_gradient() -> None:
    """The gradient is K f: that of P alone, with f held fixed."""
    scores = random_routing().scores.detach().requires_grad_()
    load_balance_loss(Routing(scores, scores)).backward()
    f = nn.functional.one_hot(scores.argmax(-1), 4).float().mean(0)
    torch.testing.assert_close(scores.grad, (4 * f / 50).expand(50, 3, 4))


@pytest.mark.parametrize("top_k", [None, 2])
def test_z_loss_formula(top_k) -> None:
    """Over all logits, those of dropped experts included."""
    routing = random_routing(top_k=top_k)
    expected = routing.logits.exp().sum(-1).log().pow(2).sum() / 50
    torch.testing.assert_close(z_loss(routing), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype) -> None:
    """The sums of these rows overflow float16, and bfloat16 cannot count them."""
    scores, logits = (tensor.detach().to(dtype) for tensor in random_routing(70_001))
    half, whole = Routing(scores, 4 * logits), Routing(scores.float(), 4 * logits.float())
    for loss in (load_balance_loss, z_loss):
        torch.testing.assert_close(loss(half), loss(whole), rtol=0, atol=0)


def test_losses_of_no_samples_are_zero() -> None:
    nothing = Routing(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4))
    assert load_balance_loss(nothing) == 0
    assert z_loss(nothing) == 0


def test_diversity_extremes_and_formula() -> None:
    assert expert_diversity_loss(torch.eye(4).expand(3, 4, 4)) == 0
    torch.testing.assert_close(expert_diversity_loss(torch.ones(3, 4, 5)), torch.tensor(3.0))
    assert expert_diversity_loss(torch.randn(3, 1, 5)) == 0
    expert_v = torch.randn(3, 4, 5)
    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]
    expected = sum(
        torch.cosine_similarity(layer[i], layer[j], dim=0) ** 2
        for layer in expert_v
        for i, j in pairs
    )
    torch.testing.assert_close(expert_diversity_loss(expert_v), expected / len(pairs))
    torch.testing.assert_close(expert_diversity_loss(-7 * expert_v), expected / len(pairs))


def two_router_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4, top_k=2)),
        HiLoMoEMLP(10, [8, 6], HiLoMoEConfig(2, 5)),
    )


def test_auxiliary_loss_sums_over_routers_and_linears() -> None:
    model = two_router_model()
    losses = AuxiliaryLoss(model, AuxiliaryLossConfig(0.5, 0.25, 2.0))
    model(torch.randn(20, 12))
    first, second = model[0].router.routing, model[1].router.routing
    actual = losses()
    balance = load_balance_loss(first, top_k=2) + load_balance_loss(second)
    torch.testing.assert_close(actual.load_balance, balance)
    torch.testing.assert_close(actual.z_loss, z_loss(first) + z_loss(second))
    experts = [model[0].expert_v, *(linear.expert_v for linear in model[1].linears)]
    diversity = sum(expert_diversity_loss(v) for v in experts)
    torch.testing.assert_close(actual.diversity, diversity)
    expected_total = 0.5 * balance + 0.25 * actual.z_loss + 2.0 * diversity
    torch.testing.assert_close(actual.total, expected_total)


@pytest.mark.parametrize("z_weight", [0.0, 0.5])
@pytest.mark.parametrize("balance_weight", [0.0, 0.5])
def test_a_loss_of_weight_0_is_not_computed(balance_weight, z_weight) -> None:
    """Not even as a gradient of zeros, which would reach all keys; nor is its overflow seen."""
    model = HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4))
    losses = AuxiliaryLoss(model, AuxiliaryLossConfig(balance_weight, z_weight))
    scores = random_routing().scores.detach().requires_grad_()
    logits = torch.full((50, 3, 4), 1.0 if z_weight else 1e30).requires_grad_()
    model.router.routing = Routing(scores, logits)
    actual = losses()
    assert actual.total.isfinite()
    if balance_weight or z_weight:
        actual.total.backward()
    assert (scores.grad is not None) is (actual.load_balance > 0).item() is bool(balance_weight)
    assert (logits.grad is not None) is (actual.z_loss > 0).item() is bool(z_weight)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["load_balance", "z_loss", "diversity"])
def test_weights_that_are_no_numbers_are_refused(name, weight) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be finite and at least 0, got {weight}"):
        AuxiliaryLossConfig(**{name: weight})


def test_a_weight_in_place_of_the_weights_is_refused() -> None:
    with pytest.raises(TypeError, match="config must be an AuxiliaryLossConfig, got 0.001"):
        AuxiliaryLoss(nn.Linear(2, 2), 1e-3)


def test_a_skipped_layer_counts_as_no_samples() -> None:
    """Towers that take turns: each forward runs one of them."""
    towers = nn.ModuleList(HiLoMoELinear(12, 1, HiLoMoEConfig(3, 4)) for _ in range(2))
    losses = AuxiliaryLoss(towers, AuxiliaryLossConfig())
    for turn in (0, 1, 0):
        towers[1 - turn].router.skip()
        output = towers[turn](torch.randn(5, 12)).mean()
        assert losses().load_balance >= 3
        assert losses().load_balance <= 3 * 4  # of one tower
        (output + losses().total).backward()


def test_auxiliary_loss_trains_router_and_lower_layers() -> None:
    model = two_router_model()
    losses = AuxiliaryLoss(model, AuxiliaryLossConfig())
    model(torch.randn(20, 12))
    losses().total.backward()
    assert model[0].router.keys.grad.any()
    assert model[1].router.keys.grad.any()
    assert model[0].weight.grad.any()  # by way of the second router's query
    assert model[0].expert_v.grad is None or not model[0].expert_v.grad.any()


def test_auxiliary_loss_is_zero_in_evaluation() -> None:
    model = two_router_model()
    losses = AuxiliaryLoss(model, AuxiliaryLossConfig(diversity=1.0))
    model(torch.randn(20, 12))
    losses.eval()
    assert all(loss == 0 for loss in losses())


def test_auxiliary_loss_before_any_forward_is_zero() -> None:
    losses = AuxiliaryLoss(two_router_model(), AuxiliaryLossConfig())
    assert losses().total == 0


def test_auxiliary_loss_without_routers_is_zero() -> None:
    losses = AuxiliaryLoss(nn.Linear(3, 2), AuxiliaryLossConfig(diversity=1.0))
    assert all(loss == 0 for loss in losses())


class TrainWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = two_router_model()
        self.auxiliary_loss = AuxiliaryLoss(self.model, AuxiliaryLossConfig())

    def forward(self, x: Tensor) -> Tensor:
        task_loss = self.model(x).square().mean()
        return task_loss + self.auxiliary_loss().total


def test_auxiliary_loss_repeats_no_parameter() -> None:
    wrapper = TrainWrapper()
    assert list(wrapper.auxiliary_loss.parameters()) == []
    assert all(key.startswith("model.") for key in wrapper.state_dict())


def test_copies_read_their_own_model() -> None:
    wrapper = TrainWrapper()
    x = torch.randn(20, 12)
    wrapper(x)
    clone = copy.deepcopy(wrapper)
    assert clone.auxiliary_loss().total == 0
    torch.testing.assert_close(clone(x), wrapper(x))


def test_survives_tracing_as_a_leaf() -> None:
    """As TorchRec's pipelines trace a train wrapper: modules without tables are leaves."""
    wrapper = TrainWrapper()
    traced = torchrec.fx.symbolic_trace(
        wrapper, leaf_modules=["AuxiliaryLoss", "HiLoMoELinear", "HiLoMoEMLP"]
    )
    for batch in (20, 10):
        x = torch.randn(batch, 12)
        torch.testing.assert_close(traced(x), wrapper(x))
