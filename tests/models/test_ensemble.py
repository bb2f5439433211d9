"""Ensembles: members are the models they would be alone, in output, loss and gradient."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torchrec.datasets.utils import Batch
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_hilomoe.models import (
    DLRM_HiLoMoETrain,
    build_model,
    interaction_names,
    parse_model_config,
)
from torchrec_hilomoe.models.ensemble import (
    EnsembleInteractionArch,
    EnsembleOverArch,
    TaskLoss,
)

MEMBERS, DIM, NUM_DENSE = 3, 8, 5
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


@pytest.fixture
def tables() -> EmbeddingBagCollection:
    torch.manual_seed(0)
    names = [f"f{i}" for i in range(4)]
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name="t", embedding_dim=DIM * MEMBERS, num_embeddings=50, feature_names=names
            )
        ]
    )


def _build(name, tables, num_dense=NUM_DENSE, **options):
    common = {"embedding_dim": DIM, "over_arch_layer_sizes": [12], "ensemble_size": MEMBERS}
    torch.manual_seed(1)
    return build_model(parse_model_config({"name": name, **common, **options}), tables, num_dense)


def _member_logits(model, dense, sparse):
    """Each member by hand, from its columns of the embeddings."""
    embedded_dense, embedded = model.dense_arch(dense), model.sparse_arch(sparse)
    columns = [slice(i * DIM, (i + 1) * DIM) for i in range(MEMBERS)]
    return torch.cat(
        [
            over(inter(dense_features=embedded_dense[:, c], sparse_features=embedded[..., c]))
            for inter, over, c in zip(
                model.inter_arch.members, model.over_arch.members, columns, strict=True
            )
        ],
        dim=1,
    )


@pytest.mark.parametrize("name", interaction_names())
def test_predicts_the_mean_probability_of_its_members(name, tables, make_features):
    model = _build(name, tables)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    logits = model(dense, sparse)
    members = _member_logits(model, dense, sparse)
    assert logits.shape == (6, 1)
    assert members.std(dim=1).min() > 0
    torch.testing.assert_close(
        logits.sigmoid(), members.sigmoid().mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-6
    )


def test_members_learn_as_they_would_alone(tables, make_features):
    model = _build("hilomoe", tables, num_experts=4)
    alone = copy.deepcopy(model)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    loss, output = DLRM_HiLoMoETrain(model)(Batch(dense, sparse, LABELS))
    (loss - output.auxiliary).backward()
    own = _member_logits(alone, dense, sparse)
    sum(bce(logits, LABELS) for logits in own.unbind(1)).backward()
    for (name, got), expected in zip(
        model.over_arch.named_parameters(), alone.over_arch.parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    torch.testing.assert_close(output.loss, bce(output.logits, LABELS))
    assert loss - output.auxiliary > output.loss


def test_the_gradient_passes_through_what_the_model_returned(tables, make_features):
    """DDP with a static graph, as TorchRec's DMP has it, averages nothing without."""
    model, passed = _build("dlrm", tables), []
    logits = model(torch.rand(6, NUM_DENSE), make_features())
    logits.register_hook(passed.append)
    TaskLoss(model)(logits.squeeze(1), LABELS)[1].backward()
    assert len(passed) == 1
    assert not passed[0].any()


def test_members_logits_without_a_gradient_are_refused(tables, make_features):
    model = _build("dlrm", tables)
    run = functools.partial(model, torch.rand(6, NUM_DENSE), make_features())
    logits = run().squeeze(1)
    with torch.no_grad():  # as reentrant activation checkpointing runs the over arch
        run()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        TaskLoss(model)(logits, LABELS)


def test_evaluation_minimises_nothing_else(tables, make_features):
    model = DLRM_HiLoMoETrain(_build("dlrm", tables)).eval()
    loss, output = model(Batch(torch.rand(6, NUM_DENSE), make_features(), LABELS))
    assert torch.equal(loss, output.loss)
    assert model.model.over_arch.member_logits.shape == (0, MEMBERS)


def test_without_dense_features(tables, make_features):
    assert _build("dcn", tables, num_dense=0)(torch.empty(6, 0), make_features()).shape == (6, 1)


def test_extreme_logits_stay_finite():
    arch = EnsembleOverArch([nn.Identity(), nn.Identity()])
    logits = torch.tensor([[200.0, 150.0], [-200.0, -150.0], [200.0, -200.0]])
    expected = torch.tensor([[150.0 + 0.6931], [-150.0 - 0.6931], [0.0]])
    torch.testing.assert_close(arch(logits), expected, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_after_a_forward(tables, make_features):
    model = _build("hilomoe", tables)
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    expected = model(dense, sparse)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.over_arch.member_logits.shape == (0, MEMBERS)
        torch.testing.assert_close(other(dense, sparse), expected)


def test_copies_of_a_compiled_over_arch_have_their_own_weights():
    arch, features = EnsembleOverArch([nn.Linear(3, 1), nn.Linear(3, 1)]), torch.rand(4, 6)
    arch.compile(backend="eager")
    expected = arch(features)
    for other in (copy.deepcopy(arch), pickle.loads(pickle.dumps(arch))):
        torch.testing.assert_close(other(features), expected)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        assert not other(features).any()


@pytest.mark.parametrize("name", ["dlrm", "hilomoe"])
def test_traces_and_scripts(name, tables, make_features):
    model = _build(name, tables).eval()
    dense, sparse = torch.rand(6, NUM_DENSE), make_features()
    expected = model(dense, sparse)
    scripted = torch.jit.script(symbolic_trace(model))
    torch.testing.assert_close(scripted(dense, sparse), expected)


def test_state_dict_holds_each_member_once(tables):
    model = _build("hilomoe", tables)
    names = set(DLRM_HiLoMoETrain(model).state_dict())
    assert names == {f"model.{name}" for name in model.state_dict()}


def test_task_loss_of_a_model_without_members():
    task, to_minimise = TaskLoss(nn.Linear(2, 1))(torch.randn(6), LABELS)
    assert torch.equal(task, to_minimise)


def test_task_loss_of_an_over_arch_in_evaluation_mode_is_of_this_batch():
    arch = EnsembleOverArch([nn.Linear(3, 1), nn.Linear(3, 1)])
    loss = TaskLoss(arch)
    arch(torch.rand(6, 6))  # its logits stay
    task, to_minimise = loss(arch.eval()(torch.rand(6, 6)).squeeze(1), LABELS)
    assert torch.equal(task, to_minimise)


def test_interaction_keeps_members_apart():
    arch = EnsembleInteractionArch([_Cat(), _Cat()])
    dense = torch.randn(2, 4, requires_grad=True)
    arch(dense_features=dense, sparse_features=torch.rand(2, 3, 4))[:, :8].sum().backward()
    assert dense.grad.ne(0).tolist() == [[True, True, False, False]] * 2


class _Cat(nn.Module):
    def forward(self, dense_features, sparse_features):
        return torch.cat((dense_features, sparse_features.flatten(1)), dim=1)
