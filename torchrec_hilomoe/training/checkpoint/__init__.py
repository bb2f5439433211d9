"""Checkpoints: the whole state of a run in verified folders, written whole or not at all."""

from torchrec_hilomoe.training.checkpoint.description import (
    CheckpointInfo,
    RunInfo,
    read_info,
    read_run,
)
from torchrec_hilomoe.training.checkpoint.folder import CheckpointFolder
from torchrec_hilomoe.training.checkpoint.integrity import verify
from torchrec_hilomoe.training.checkpoint.resume import check_named, verify_on_all_ranks
from torchrec_hilomoe.training.checkpoint.run_checkpoints import RunCheckpoints
from torchrec_hilomoe.training.checkpoint.state import load_model
from torchrec_hilomoe.training.checkpoint.warm_start import warm_start

__all__ = [
    "CheckpointFolder",
    "CheckpointInfo",
    "RunCheckpoints",
    "RunInfo",
    "check_named",
    "load_model",
    "read_info",
    "read_run",
    "verify",
    "verify_on_all_ranks",
    "warm_start",
]
