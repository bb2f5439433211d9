"""``torch.export`` of a model for requests of any size."""

from __future__ import annotations

import torch

from torchrec_hilomoe.inference.flat_inputs import FlatInputs, Request


def export_model(model: FlatInputs) -> torch.export.ExportedProgram:
    """Exports a model for any number of samples, one included, and any number of ids of each.

    The program needs torch alone. TorchRec's mixture cross net (``dcn_mixture``) is exported for
    two samples and more.

    Args:
        model (FlatInputs): unsharded, in evaluation mode; int8 tables cannot be exported.

    Returns:
        ExportedProgram: takes what `FlatInputs` takes.

    Example:
        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> table = EmbeddingBagConfig(
        ...     name="t", embedding_dim=8, num_embeddings=100, feature_names=["user"]
        ... )
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 3, [8], [4, 1]).eval()
        >>> program = export_model(FlatInputs(dlrm, ["user"], num_dense=3))
        >>> one = torch.rand(1, 3), torch.tensor([7]), torch.tensor([1], dtype=torch.int32)
        >>> program.module()(*one).shape
        torch.Size([1, 1])
    """
    parameter = next(model.parameters(), torch.empty(0))
    auto = {0: torch.export.Dim.AUTO}
    # Otherwise torch.export takes it that a batch is never one sample.
    oblivious = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
    with torch.no_grad(), oblivious:
        return torch.export.export(
            model,
            _example(model, parameter.device),
            dynamic_shapes=(auto, auto, auto),
            strict=False,
        )


def _example(model: FlatInputs, device: torch.device) -> Request:
    """A request whose sizes differ, so that none is taken for another."""
    samples = 3
    lengths = torch.ones(samples * len(model.keys), dtype=torch.int32, device=device)
    lengths[0] = samples
    values = torch.zeros(int(lengths.sum()), dtype=torch.int64, device=device)
    return torch.zeros(samples, model.num_dense, device=device), values, lengths
