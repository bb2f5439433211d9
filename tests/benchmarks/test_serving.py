from __future__ import annotations

import pytest
import torch

from torchrec_hilomoe.data import FeatureSpec, SparseFeature

FEATURES = FeatureSpec(("price",), (SparseFeature("user", 40), SparseFeature("item", 40)))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def serving(load, monkeypatch):
    module = load("serving")
    monkeypatch.setattr(module, "FEATURES", FEATURES)
    return module


def make_forms(serving, load, inductor: bool):
    config = load("runs").run_config("hilomoe", ["model.embedding_dim=8"]).model
    model = serving.serving_model(config)
    with torch.inference_mode():
        return load("serving_forms").serving_forms(model, inductor)


def test_members_of_an_ensemble_read_their_own_columns(serving, load) -> None:
    overrides = ["model.embedding_dim=8", "model.ensemble_size=2"]
    model = serving.serving_model(load("runs").run_config("dlrm", overrides).model)
    assert model.model.sparse_arch.D == 16
    assert len(model.model.inter_arch.members) == 2


@pytest.mark.slow
def test_every_form_gives_the_logits_of_eager(serving, load) -> None:
    forms = make_forms(serving, load, inductor=False)
    with torch.inference_mode():
        for samples in (1, 2, 50):
            request = serving.random_request(samples, seed=samples)
            assert forms["eager"](*request).shape == (samples, 1)
            for form, difference in serving.logit_differences(forms, request).items():
                assert difference < (0.01 if "int8" in form else 1e-5), form
        latencies = serving.latency(forms, samples=2, rounds=3)
    assert latencies.keys() == forms.keys()
    assert all(0 < p50 <= p99 for p50, p99 in latencies.values())


@pytest.mark.slow
def test_compiled_forms_give_the_logits_of_eager(serving, load) -> None:
    torch.compiler.reset()
    forms = make_forms(serving, load, inductor=True)
    with torch.inference_mode():
        for samples in (1, 50):
            differences = serving.logit_differences(forms, serving.random_request(samples))
            assert differences["compiled"] < 1e-5
            assert differences["AOTInductor"] < 1e-5
