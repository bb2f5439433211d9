"""A model in every form in which it can serve, each from the same flat tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.inference.modules import quantize_inference_model

from torchrec_hilomoe.inference import FlatInputs, export_model

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def serving_forms(flat: FlatInputs, inductor: bool) -> dict[str, Form]:
    """Makes the forms.

    Args:
        flat (FlatInputs): around an unsharded model, in evaluation mode.
        inductor (bool): also those that a C++ compiler has to build, for a minute each.

    Returns:
        dict[str, Form]: by name; ``eager`` comes first.
    """

    def with_inputs(model: nn.Module) -> FlatInputs:
        return FlatInputs(model, flat.keys, flat.num_dense)

    int8 = quantize_inference_model(copy.deepcopy(flat.model), quantization_dtype=torch.qint8)
    forms: dict[str, Form] = {
        "eager": flat,
        "scripted": with_inputs(_scripted(flat.model)),
        "exported": export_model(flat).module(),
        "int8 tables": with_inputs(int8),
        "int8 tables, scripted": with_inputs(_scripted(copy.deepcopy(int8))),
    }
    if inductor:
        forms["compiled"] = with_inputs(_compiled(flat.model))
        forms["AOTInductor"] = _ahead_of_time(flat)
    return forms


def _scripted(model: nn.Module) -> nn.Module:
    """Spoils the model where its tables are int8: these keep what tracing hands them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.freeze(torch.jit.script(symbolic_trace(model)).eval())


def _compiled(model: nn.Module) -> nn.Module:
    """Everything but the lookup, for any batch size."""
    model = copy.deepcopy(model)
    for part in (model.dense_arch, model.inter_arch, model.over_arch):
        if part is not None:
            part.compile(dynamic=True)
    return model


def _ahead_of_time(flat: FlatInputs) -> Form:
    with TemporaryDirectory() as folder:
        package = str(Path(folder) / "model.pt2")
        torch._inductor.aoti_compile_and_package(export_model(flat), package_path=package)
        return torch._inductor.aoti_load_package(package)
