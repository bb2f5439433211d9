"""From a checkpoint to a model that serves."""

from __future__ import annotations

from pathlib import Path

import torch

from torchrec_hilomoe.inference.flat_inputs import FlatInputs
from torchrec_hilomoe.models import DLRM_HiLoMoETrain, build_model
from torchrec_hilomoe.modules import set_experts_enabled
from torchrec_hilomoe.training import make_tables
from torchrec_hilomoe.training.checkpoint import read_info, verify
from torchrec_hilomoe.training.checkpoint.description import WEIGHTS
from torchrec_hilomoe.training.checkpoint.safe_load import load_tensors


def load_for_serving(
    checkpoint: Path | str, device: torch.device | str | None = None
) -> FlatInputs:
    """Loads the model of a checkpoint into this process, tables and all.

    Needs no process group; inside of one it is no collective. The checkpoint may come from any
    number of ranks. A model of one's own serves once the module is imported that registers it.

    Args:
        checkpoint (Path | str): such as ``OUTPUT_DIR/checkpoints/best``.
        device (torch.device | str | None): None for the CPU.

    Returns:
        FlatInputs: in evaluation mode, without gradients, with the experts on or off as they were
        when it was chosen. Its ``model`` takes what the trained one took, a ``KeyedJaggedTensor``.

    Raises:
        ConfigError: there is no checkpoint, its description cannot be read, or nothing is
            registered under its model's name.
        CheckpointError: it is damaged, or does not fit the model that is registered.
    """
    checkpoint = Path(checkpoint)
    info = read_info(checkpoint)
    verify(checkpoint)
    device = torch.device(device or "cpu")
    tables = make_tables(info.features, info.model.table_dim).to_empty(device=device)
    model = build_model(info.model, tables, len(info.features.dense), device)
    train_model = DLRM_HiLoMoETrain(model)  # the names in a checkpoint are its
    state = {"model": train_model.state_dict()}
    load_tensors(state, checkpoint / WEIGHTS, no_dist=True)
    train_model.load_state_dict(state["model"])
    set_experts_enabled(model, info.experts)
    keys = [feature.name for feature in info.features.sparse]
    return FlatInputs(model, keys, len(info.features.dense)).eval().requires_grad_(False)
