"""A model in every form in which it can serve, each from the same flat tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.inference.modules import quantize_inference_model
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Request = tuple[Tensor, Tensor, Tensor]  # dense [B, num_dense], values [N], lengths [F * B]
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


class FlatInputs(nn.Module):
    """Takes tensors alone, for runtimes that know of no ``KeyedJaggedTensor``.

    Args:
        model (nn.Module): ``(dense_features, sparse_features) -> logits``.
        keys (Sequence[str]): of the sparse features, in the order of the tables.
    """

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model, self.keys = model, list(keys)

    def forward(self, dense: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """``[B, num_dense]``, ids and bag lengths, feature by feature, to logits ``[B, 1]``."""
        return self.model(dense, KeyedJaggedTensor(self.keys, values, lengths=lengths))


def serving_forms(
    model: nn.Module, keys: Sequence[str], example: Request, inductor: bool
) -> dict[str, Form]:
    """Makes the forms.

    Args:
        model (nn.Module): unsharded, in evaluation mode.
        keys (Sequence[str]): of the sparse features.
        example (Request): of at least two samples, to trace with.
        inductor (bool): also those that a C++ compiler has to build, for a minute each.

    Returns:
        dict[str, Form]: by name; ``eager`` comes first.
    """
    int8 = quantize_inference_model(copy.deepcopy(model), quantization_dtype=torch.qint8)
    forms: dict[str, Form] = {
        "eager": FlatInputs(model, keys),
        "scripted": FlatInputs(_scripted(model), keys),
        "exported": _exported(model, keys, example).module(),
        "int8 tables": FlatInputs(int8, keys),
        "int8 tables, scripted": FlatInputs(_scripted(copy.deepcopy(int8)), keys),
    }
    if inductor:
        forms["compiled"] = FlatInputs(_compiled(model), keys)
        forms["AOTInductor"] = _ahead_of_time(model, keys, example)
    return forms


def _scripted(model: nn.Module) -> nn.Module:
    """Spoils the model where its tables are int8: these keep what tracing hands them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.freeze(torch.jit.script(symbolic_trace(model)).eval())


def _exported(
    model: nn.Module, keys: Sequence[str], example: Request
) -> torch.export.ExportedProgram:
    auto = {0: torch.export.Dim.AUTO}
    # Otherwise torch.export takes it that a batch is never one sample.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(
            FlatInputs(model, keys), example, dynamic_shapes=(auto, auto, auto), strict=False
        )


def _compiled(model: nn.Module) -> nn.Module:
    """Everything but the lookup, for any batch size."""
    model = copy.deepcopy(model)
    for part in (model.dense_arch, model.inter_arch, model.over_arch):
        if part is not None:
            part.compile(dynamic=True)
    return model


def _ahead_of_time(model: nn.Module, keys: Sequence[str], example: Request) -> Form:
    with TemporaryDirectory() as folder:
        package = str(Path(folder) / "model.pt2")
        torch._inductor.aoti_compile_and_package(
            _exported(model, keys, example), package_path=package
        )
        return torch._inductor.aoti_load_package(package)
