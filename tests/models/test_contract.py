"""What a third party's builder returns is checked before anything is trained."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import (
    Interaction,
    build_model,
    interaction_names,
    parse_model_config,
    register_interaction,
)
from torchrec_hilomoe.models.contract import check_interaction
from torchrec_hilomoe.models.registry import InteractionContext, get_interaction

CONTEXT = InteractionContext(num_sparse_features=3, embedding_dim=8)


@dataclass
class NoOptions:
    pass


class Noisy(nn.Module):
    """Counts its calls and draws random numbers, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.frozen = nn.BatchNorm1d(5).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.list: list[int] = []

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.list.append(1)
        return self.frozen(self.linear(dense_features)) + torch.rand(5, device=self.calls.device)


@pytest.mark.parametrize(
    ("built", "found"),
    [
        (nn.Identity(), "Identity"),
        ((Noisy(), 5), "tuple"),
        (None, "NoneType"),
        (Interaction("Noisy", 5), "Interaction of str"),
    ],
)
def test_a_builder_returns_an_interaction(built, found):
    expected = rf"model\.name=mine: .* must return Interaction\(module, out_features\), got {found}"
    with pytest.raises(ConfigError, match=expected):
        check_interaction("mine", built, CONTEXT)


def test_a_promised_width_that_is_not_the_modules_is_named(collection):
    @register_interaction("too_wide", NoOptions)
    def build_too_wide(context, config):
        return Interaction(Noisy(), 6)

    config = parse_model_config({"name": "too_wide", "embedding_dim": 8})
    message = r"model\.name=too_wide: .* out_features=6, .*\[2, 6\], but .* returns \[2, 5\]"
    with pytest.raises(ConfigError, match=message):
        build_model(config, collection, 0)


def test_a_module_that_cannot_be_copied_is_taken_as_it_is():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
    module.lock = threading.Lock()
    interaction = Interaction(module, 5)
    assert check_interaction("mine", interaction, CONTEXT) is interaction


def test_an_output_that_is_no_tensor_is_named():
    class Pair(nn.Module):
        def forward(self, dense_features, sparse_features):
            return dense_features, sparse_features

    with pytest.raises(ConfigError, match=r"model\.name=pair: .* returns tuple"):
        check_interaction("pair", Interaction(Pair(), 8), CONTEXT)


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("meta")])
def test_the_check_leaves_no_trace(device):
    module = Noisy().to(device or "cpu")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    context = InteractionContext(CONTEXT.num_sparse_features, CONTEXT.embedding_dim, device)
    check_interaction("noisy", Interaction(module, 5), context)
    assert torch.equal(torch.get_rng_state(), random)
    if not module.calls.is_meta:
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.list == []
    assert [part.training for part in (module, module.linear, module.frozen)] == [True, True, False]


@pytest.mark.parametrize("name", interaction_names())
def test_models_are_initialised_as_without_the_check(name, monkeypatch):
    options = parse_model_config({"name": name, "embedding_dim": 8}).interaction

    def weights(check: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        built = get_interaction(name).build(CONTEXT, options)
        if check:
            check_interaction(name, built, CONTEXT)
        return [*built.module.state_dict().values(), torch.rand(1)]

    for with_check, without in zip(weights(True), weights(False), strict=True):
        assert torch.equal(with_check, without)


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_state_that_no_checkpoint_holds_is_refused():
    module = nn.Sequential(Stateful(8, 5))
    with pytest.raises(ConfigError, match=r"model.name=mine: 0._extra_state .* a dict, and check"):
        check_interaction("mine", Interaction(module, 5), CONTEXT)
