"""Exported programs take what the model takes, in requests of any size."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from torchrec_hilomoe.data import FeatureSpec, SparseFeature
from torchrec_hilomoe.inference import FlatInputs, Request, export_model
from torchrec_hilomoe.models import build_model, interaction_names, parse_model_config
from torchrec_hilomoe.training import init_tables, make_tables

SPARSE = (SparseFeature("user", 50), SparseFeature("item", 50), SparseFeature("tags", 50, "mean"))
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in interaction_names()},
    "no dot products": {"name": "hilomoe", "dot_products": False},
    "few kept": {"name": "hilomoe", "num_experts": 64, "top_k": 2},
    "ensemble": {"name": "hilomoe", "ensemble_size": 2},
}

pytestmark = pytest.mark.filterwarnings("ignore")


def make_flat(options: dict[str, Any], num_dense: int) -> FlatInputs:
    """A model of random weights whose experts are not silent."""
    torch.manual_seed(0)
    features = FeatureSpec(tuple(f"x{i}" for i in range(num_dense)), SPARSE)
    config = parse_model_config({"embedding_dim": 8, **options})
    tables = make_tables(features, config.table_dim).to_empty(device="cpu")
    model = build_model(config, tables, num_dense)
    init_tables(model, seed=0, std=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("expert_u"):
            nn.init.normal_(parameter, std=0.1)
    return FlatInputs(model, [feature.name for feature in SPARSE], num_dense).eval()


def make_request(samples: int, num_dense: int, bag: int = 4) -> Request:
    """Bags of less than ``bag`` ids, empty ones among them."""
    generator = torch.Generator().manual_seed(samples)
    size = (len(SPARSE) * samples,)
    lengths = torch.randint(bag, size, generator=generator, dtype=torch.int32)
    values = torch.randint(50, (int(lengths.sum()),), generator=generator)
    return torch.rand(samples, num_dense, generator=generator), values, lengths


@pytest.mark.slow
@pytest.mark.parametrize("num_dense", [0, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_program_takes_any_number_of_samples_and_ids(name: str, num_dense: int) -> None:
    model = make_flat(OPTIONS[name], num_dense)
    program = export_model(model).module()
    one = 2 if name == "dcn_mixture" else 1  # its matrix products are exported for two and more
    for samples in (one, 2, 3, 70):
        request = make_request(samples, num_dense)
        with torch.no_grad():
            torch.testing.assert_close(program(*request), model(*request))


def test_a_saved_program_needs_neither_this_library_nor_torchrec(tmp_path) -> None:
    model, request = make_flat({"name": "hilomoe"}, 2), make_request(1, 2)
    torch.export.save(export_model(model), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save((request, model(*request)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "request, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.export.load('model.pt2').module()(*request), expected)\n"
        "assert not {'torchrec', 'fbgemm_gpu', 'torchrec_hilomoe'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
