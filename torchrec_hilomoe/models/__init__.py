"""Models, as in `torchrec.models`: DLRM around any interaction, a registry, a train wrapper."""

from torchrec_hilomoe.models import interactions as _interactions  # noqa: F401 (registers)
from torchrec_hilomoe.models.build import (
    ModelConfig,
    build_model,
    model_config_dict,
    parse_model_config,
)
from torchrec_hilomoe.models.dlrm import DLRM_HiLoMoE, InteractionDLRM
from torchrec_hilomoe.models.ensemble import (
    EnsembleInteractionArch,
    EnsembleOverArch,
    TaskLoss,
)
from torchrec_hilomoe.models.interactions import InteractionCatArch
from torchrec_hilomoe.models.over_arch import OverArch
from torchrec_hilomoe.models.registry import (
    Interaction,
    InteractionContext,
    get_interaction,
    import_plugins,
    interaction_names,
    register_interaction,
)
from torchrec_hilomoe.models.sparse_arch import SparseArch
from torchrec_hilomoe.models.train import DLRM_HiLoMoETrain, TrainOutput

__all__ = [
    "DLRM_HiLoMoE",
    "DLRM_HiLoMoETrain",
    "EnsembleInteractionArch",
    "EnsembleOverArch",
    "Interaction",
    "InteractionCatArch",
    "InteractionContext",
    "InteractionDLRM",
    "ModelConfig",
    "OverArch",
    "SparseArch",
    "TaskLoss",
    "TrainOutput",
    "build_model",
    "get_interaction",
    "import_plugins",
    "interaction_names",
    "model_config_dict",
    "parse_model_config",
    "register_interaction",
]
