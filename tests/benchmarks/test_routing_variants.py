"""The readings of the method that the ablations compare: each does what its name says."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import InteractionContext
from torchrec_hilomoe.models.interactions import HiLoMoEOptions
from torchrec_hilomoe.modules import HiLoMoELinear, parameter_part

CONTEXT = InteractionContext(num_sparse_features=3, embedding_dim=8)


@pytest.fixture
def variants(load):
    return load("routing_variants")


@pytest.fixture
def linear(variants):
    """A layer with experts that are heard, by the options of its variant."""

    def build(**options):
        torch.manual_seed(0)
        options = variants.VariantOptions(num_layers=3, num_experts=4, **options)
        layer = variants.VariantLinear(CONTEXT, 32, 6, options)
        with torch.no_grad():
            layer.expert_u.normal_()
        return layer

    return build


def routing(layer, x):
    layer(x)
    return layer.router.routing


def test_defaults_are_the_library(linear) -> None:
    variant, library = linear(), HiLoMoELinear(32, 6, HiLoMoEOptions(num_layers=3, num_experts=4))
    library.load_state_dict(variant.state_dict())
    x = torch.randn(5, 32)
    assert_close(variant(x), library(x))


@pytest.mark.parametrize(
    "option",
    [
        {"gate": "sigmoid"},
        {"gate": "centred"},
        {"temperature": 0.1},
        {"hierarchy": "none"},
        {"hierarchy": "outputs"},
        {"hierarchy": "scores_alone"},
        {"score_weight": 4.0},
        {"query_fields": (0, 2)},
        {"query_fields": ()},
        {"expert_relu": True},
        {"expert_v_scale": 3.0},
    ],
    ids=str,
)
def test_every_parameter_of_a_variant_learns(linear, option) -> None:
    layer = linear(**option)
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    parts = parameter_part(layer)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("router.readers"):
            assert parts[name] == "router"
    assert not torch.equal(layer(x), linear()(x))
    layer.experts_enabled = False
    assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_equal_use_is_no_use_with_centred_gates(linear) -> None:
    layer = linear(gate="centred", temperature=1e9)
    x = torch.randn(5, 32)
    assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_sigmoid_gates_start_with_a_mean_of_about_1(linear) -> None:
    scores = routing(linear(gate="sigmoid", temperature=1e9), torch.randn(5, 32)).scores
    assert_close(4 * scores, torch.ones_like(scores))


def test_outputs_decide_only_where_they_are_read(linear) -> None:
    x = torch.randn(5, 32)
    for hierarchy, reads in {"scores": False, "none": False, "outputs": True}.items():
        layer = linear(hierarchy=hierarchy)
        before = routing(layer, x).logits
        with torch.no_grad():
            layer.expert_u[0] += torch.randn_like(layer.expert_u[0])
        after = routing(layer, x).logits
        assert_close(after[:, 0], before[:, 0])
        assert torch.equal(after, before) is not reads


def test_outputs_that_are_read_are_made_once(linear) -> None:
    def flops(hierarchy: str) -> int:
        layer = linear(hierarchy=hierarchy)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(5, 32))
        return counter.get_total_flops()

    out_features, query_dim, readers = 6, 32, 2
    assert flops("outputs") - flops("none") == readers * 2 * 5 * out_features * query_dim


def test_layers_without_hierarchy_do_not_know_of_each_other(linear) -> None:
    x = torch.randn(5, 32)
    for hierarchy, independent in {"scores": False, "none": True}.items():
        layer = linear(hierarchy=hierarchy)
        before = routing(layer, x).logits
        with torch.no_grad():
            layer.router.keys[0] += 1.0
        after = routing(layer, x).logits
        assert torch.equal(after[:, 1:], before[:, 1:]) is independent


def test_scores_weigh_in_the_next_query(linear) -> None:
    x = torch.randn(5, 32)
    unread, once, four = (
        routing(linear(score_weight=weight), x).logits[:, 1] for weight in (0.0, 1.0, 4.0)
    )
    assert_close(unread, routing(linear(hierarchy="none"), x).logits[:, 1])
    assert_close(four - unread, 4 * (once - unread))


def test_scores_alone_are_the_next_query(linear) -> None:
    layer, x = linear(hierarchy="scores_alone"), torch.randn(5, 32)
    scores, logits = routing(layer, x)
    keys = layer.router.keys
    queries = torch.einsum("blk,lkd->bld", scores[:, :-1], keys[:-1])
    products = torch.einsum("bld,lkd->blk", queries, keys[1:])
    assert_close(logits[:, 1:], products / keys.size(2) ** 0.5)


def test_residual_tokens_are_added_to_the_features(variants) -> None:
    torch.manual_seed(0)
    options = HiLoMoEOptions(num_layers=2, num_experts=4)
    tokens = variants.FieldTokens(CONTEXT, options)
    residual = variants.ResidualFieldTokens(CONTEXT, options)
    residual.load_state_dict(tokens.state_dict())
    fields = torch.randn(5, 4, 8)
    assert_close(residual.transformed(fields) - fields, tokens.transformed(fields))


@pytest.mark.parametrize("fields", [(0, 2), ()])
def test_the_query_knows_its_fields_alone(linear, fields) -> None:
    layer, x = linear(query_fields=fields), torch.randn(5, 32)
    before = routing(layer, x).scores
    other = torch.randn(5, 4, 8)
    other[:, list(fields)] = x.view(5, 4, 8)[:, list(fields)]
    assert torch.equal(routing(layer, other.flatten(1)).scores, before)
    assert torch.equal(before, before[:1].expand_as(before)) is not bool(fields)


@pytest.mark.parametrize("option", [{"top_k": 2}, {"tied_keys": True}, {"recompute": True}])
def test_options_that_would_be_ignored_are_refused(variants, option) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))} is not for variants"):
        variants.VariantOptions(**option)


@pytest.mark.parametrize("field", [-1, 4])
def test_an_unknown_query_field_is_named(linear, field: int) -> None:
    with pytest.raises(ConfigError, match=f"query_fields: .* 0 to 3, got {field}"):
        linear(query_fields=(0, field))


@pytest.mark.parametrize(
    "name", ["routing_variant", "field_tokens", "residual_field_tokens", "feature_gate"]
)
def test_registered_and_of_the_width_it_names(variants, name) -> None:
    options = variants.VariantOptions if name == "routing_variant" else HiLoMoEOptions
    build = getattr(variants, f"build_{name}")
    module, out_features = build(CONTEXT, options(num_layers=2, num_experts=4))
    output = module(dense_features=torch.randn(5, 8), sparse_features=torch.randn(5, 3, 8))
    assert output.shape == (5, out_features)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
