"""Every registered architecture: equal to TorchRec's own, with and without dense features."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.crossnet import LowRankMixtureCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import build_model, interaction_names, parse_model_config
from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoECrossNet, set_experts_enabled

NUM_DENSE, NUM_SPARSE, DIM = 5, 4, 8
HILOMOE = [name for name in interaction_names() if name.startswith("hilomoe")]


def _build(name, collection, num_dense, **options):
    common = {"embedding_dim": DIM, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [12]}
    config = parse_model_config({"name": name, **common, **options})
    torch.manual_seed(1)
    return build_model(config, collection, num_dense)


def _load_torchrec(model: nn.Module, reference: nn.Module) -> None:
    """Copies weights; only the over arch names its linears otherwise."""
    ours = [m for m in model.over_arch.modules() if isinstance(m, nn.Linear)]
    theirs = [m for m in reference.over_arch.modules() if isinstance(m, nn.Linear)]
    for mine, its in zip(ours, theirs, strict=True):
        mine.load_state_dict(its.state_dict())
    for part in ("sparse_arch", "dense_arch", "inter_arch"):
        getattr(model, part).load_state_dict(getattr(reference, part).state_dict())


def _randomise_experts(model: nn.Module) -> None:
    """U starts at 0; experts that are silent would hide mistakes."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("expert_u"):
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(
    ("name", "options", "torchrec_class", "arguments"),
    [
        ("dlrm", {}, DLRM, {}),
        (
            "dcn",
            {"num_layers": 2, "low_rank_dim": 3},
            DLRM_DCN,
            {"dcn_num_layers": 2, "dcn_low_rank_dim": 3},
        ),
        (
            "projection",
            {"hidden_layer_sizes": [9], "num_projections": [2, 3]},
            DLRM_Projection,
            {
                "interaction_branch1_layer_sizes": [9, 2 * DIM],
                "interaction_branch2_layer_sizes": [9, 3 * DIM],
            },
        ),
    ],
)
def test_equals_torchrec(name, options, torchrec_class, arguments, collection, make_features):
    reference = torchrec_class(
        embedding_bag_collection=collection,
        dense_in_features=NUM_DENSE,
        dense_arch_layer_sizes=[16, DIM],
        over_arch_layer_sizes=[12, 1],
        **arguments,
    )
    model = _build(name, collection, NUM_DENSE, **options)
    _load_torchrec(model, reference)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    torch.testing.assert_close(model(dense, sparse), reference(dense, sparse), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "make_reference"),
    [
        (
            "dcn_mixture",
            {"num_layers": 2, "num_experts": 3, "low_rank_dim": 5},
            lambda d: LowRankMixtureCrossNet(d, 2, num_experts=3, low_rank=5),
        ),
        (
            "hilomoe_cross",
            {"num_cross_layers": 2, "num_layers": 4, "num_experts": 3},
            lambda d: HiLoMoECrossNet(d, 2, HiLoMoEConfig(num_layers=4, num_experts=3)),
        ),
    ],
)
def test_equals_a_cross_net_over_all_features(name, options, make_reference, collection):
    arch = _build(name, collection, NUM_DENSE, **options).inter_arch
    _randomise_experts(arch)
    dense, sparse = torch.rand(6, DIM), torch.rand(6, NUM_SPARSE, DIM)
    features = torch.cat((dense, sparse.flatten(1)), dim=1)
    reference = make_reference(features.size(1))
    reference.load_state_dict(arch.crossnet.state_dict())
    torch.testing.assert_close(arch(dense, sparse), reference(features))


@pytest.mark.parametrize("num_dense", [0, NUM_DENSE])
@pytest.mark.parametrize("name", interaction_names())
def test_samples_are_independent_and_all_parameters_learn(
    name, num_dense, collection, make_features
):
    model = _build(name, collection, num_dense)
    _randomise_experts(model)
    dense, sparse = torch.rand(6, num_dense), make_features()
    logits = model(dense, sparse)
    logits.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    # The other samples change, sample 0 stays.
    mixed = _first_of_one_rest_of_other(sparse, make_features(seed=5))
    mixed_dense = torch.cat((dense[:1], torch.rand(5, num_dense)))
    torch.testing.assert_close(model(mixed_dense, mixed)[0], logits[0])


def _first_of_one_rest_of_other(one, other):
    values, lengths = [], []
    keys = one.keys()
    for key in keys:
        bags = [one[key].to_dense()[0], *other[key].to_dense()[1:]]
        values += bags
        lengths += [len(bag) for bag in bags]
    return KeyedJaggedTensor.from_lengths_sync(
        keys=keys, values=torch.cat(values).long(), lengths=torch.tensor(lengths)
    )


@pytest.mark.parametrize("name", interaction_names())
def test_traces_and_scripts(name, collection, make_features):
    model = _build(name, collection, NUM_DENSE).eval()
    _randomise_experts(model)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    expected = model(dense, sparse)
    traced = symbolic_trace(model)
    torch.testing.assert_close(traced(dense, sparse), expected)
    scripted = torch.jit.script(traced)
    torch.testing.assert_close(scripted(dense, sparse), expected)


@pytest.mark.parametrize("name", interaction_names())
def test_parts_alone_trace_and_script(name, collection):
    model = _build(name, collection, NUM_DENSE).eval()
    num_sparse = sum(len(t.feature_names) for t in collection.embedding_bag_configs())
    embedded = torch.rand(6, DIM), torch.rand(6, num_sparse, DIM)
    for part, inputs in (
        (model.inter_arch, embedded),
        (model.over_arch, (model.inter_arch(*embedded),)),
    ):
        scripted = torch.jit.script(symbolic_trace(part))
        torch.testing.assert_close(scripted(*inputs), part(*inputs))


def test_first_sparse_feature_stands_in_for_dense(collection, make_features):
    model = _build("dlrm_cat", collection, 0)
    sparse = make_features()
    embedded = model.sparse_arch(sparse)
    assert model.dense_arch is None
    torch.testing.assert_close(
        model(torch.empty(6, 0), sparse), model.over_arch(embedded.flatten(1))
    )


@pytest.mark.parametrize("name", HILOMOE)
def test_starts_as_the_dense_model(name, collection, make_features):
    model = _build(name, collection, NUM_DENSE)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    with_experts = model(dense, sparse)
    set_experts_enabled(model, False)
    assert torch.equal(model(dense, sparse), with_experts)


def test_unknown_key_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"model\.num_expert: unknown key.*num_experts"):
        parse_model_config({"name": "hilomoe", "num_expert": 3})
    with pytest.raises(ConfigError, match=r"unknown key for model\.name=hilomoe; did you mean"):
        parse_model_config({"num_expert": 3})


def test_key_of_another_model_is_unknown():
    with pytest.raises(ConfigError, match=r"model\.top_k: unknown key for model\.name=dcn"):
        parse_model_config({"name": "dcn", "top_k": 3})


def test_value_out_of_range_is_named():
    with pytest.raises(ConfigError, match=r"model\.top_k"):
        parse_model_config({"name": "hilomoe", "num_experts": 4, "top_k": 9})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hilomoe", {"fusion_scale": float("nan")}, r"model\.fusion_scale .*finite.* nan"),
        ("hilomoe", {"expert_width": 0}, r"model\.expert_width must be at least 1, got 0"),
        ("hilomoe", {"plain_width": -8}, r"model\.plain_width must be at least 1, got -8"),
        ("hilomoe", {"num_heads": 7}, r"model\.num_heads must divide .* 200 and 200; got 7"),
        ("hilomoe", {"dropout": 1.0}, r"model\.dropout"),
        ("hilomoe", {"gate_scale": float("inf")}, r"model\.gate_scale .*finite.* inf"),
        ("hilomoe_wide", {"out_features": -3}, r"model\.out_features: .*greater than 0.*-3"),
        ("hilomoe_cross", {"num_cross_layers": 0}, r"model\.num_cross_layers: .*than 0.* 0"),
        ("hilomoe_mlp", {"layer_sizes": []}, r"model\.layer_sizes: .*at least 1"),
        ("hilomoe_mlp", {"layer_sizes": [8, 0]}, r"model\.layer_sizes.*greater than 0.* 0"),
        ("dcn", {"num_layers": -1}, r"model\.num_layers: .*greater than 0.*-1"),
        ("dcn", {"low_rank_dim": 0}, r"model\.low_rank_dim: .*greater than 0.* 0"),
        ("dcn_mixture", {"num_experts": 0}, r"model\.num_experts: .*greater than 0.* 0"),
        ("projection", {"hidden_layer_sizes": [-9]}, r"model\.hidden_layer_sizes.*greater than 0"),
        ("projection", {"num_projections": [0, 8]}, r"model\.num_projections.*greater than 0"),
    ],
)
def test_sizes_and_scales_out_of_range_are_named_before_anything_is_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_model_config({"name": name, **options})


def test_a_projection_of_one_feature_is_refused():
    table = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=4, feature_names=["f"])
    with pytest.raises(ConfigError, match=r"model\.name=projection: .*more than one feature"):
        _build("projection", EmbeddingBagCollection(tables=[table]), num_dense=0)
