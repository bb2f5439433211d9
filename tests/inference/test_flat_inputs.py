"""A model that takes tensors alone does so in every form that runtimes read."""

from __future__ import annotations

import copy

import pytest
import torch
import torchrec.fx
from torchrec.inference.modules import quantize_inference_model

from torchrec_hilomoe.inference import flat_tensors, load_for_serving

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("int8", [False, True])
def test_a_scripted_program_takes_the_three_tensors(trained, tmp_path, int8):
    model = load_for_serving(trained.checkpoint)
    if int8:
        quantize_inference_model(model, quantization_dtype=torch.qint8)
    request = flat_tensors(trained.batch())
    expected = model(*request)
    scripted = torch.jit.script(torchrec.fx.symbolic_trace(copy.deepcopy(model)))
    torch.jit.freeze(scripted.eval()).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    torch.testing.assert_close(loaded(*request), expected)
