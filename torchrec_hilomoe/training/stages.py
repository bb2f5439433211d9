"""Entering a stage: what learns, what is frozen, whether the experts take part."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models import dlrm

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import DLRM_HiLoMoETrain, InteractionDLRM, SparseArch
from torchrec_hilomoe.modules import AuxiliaryLoss, RoutedLinear, set_experts_enabled
from torchrec_hilomoe.training.config import StageConfig
from torchrec_hilomoe.training.optimizers import part_parameters, planned_tables

logger = logging.getLogger(__name__)

_FROZEN = "_hilomoe_frozen_by_owner"


def enter_stage(model: DistributedModelParallel, stage: StageConfig) -> None:
    """Freezes and thaws the parts of the model as the stage asks.

    Frozen means bit for bit: frozen tables are looked up without autograd (a fused optimizer
    would step otherwise), frozen dense parameters get no gradient, and frozen batch norms use
    their running statistics. (What other modules keep, such as spectral norms, moves on.) DDP
    fixes its parameters when it wraps, so where a stage changes what learns, the dense part is
    wrapped anew, by the model's own `DataParallelWrapper`; that also saves the frozen part's
    backward pass and its communication. Dense parameters that do not require a gradient before
    the first stage never learn.

    Args:
        model (DistributedModelParallel): around any train wrapper; no pipeline attached. Every
            `AuxiliaryLoss` in it gets the stage's weights.
        stage (StageConfig): the stage.

    Raises:
        ConfigError: tables are to be frozen that are not in a `SparseArch`, this library's or
            TorchRec's own, or something else is to learn in a dense part under FSDP. The model is
            as it was.
        TypeError: the model is no `DistributedModelParallel`.
    """
    if not isinstance(model, DistributedModelParallel):
        raise TypeError(f"model must be a DistributedModelParallel, got {type(model).__name__}")
    inner, freezes, planned = model.module, "tables" not in stage.train, planned_tables(model)
    if freezes:
        _check_freezable(inner, planned)
    learns = _what_is_to_learn(inner, stage, planned)
    changes = any(p.requires_grad != value for p, value in learns.items()) or any(
        linear.experts_enabled != stage.experts
        for linear in inner.modules()
        if isinstance(linear, RoutedLinear)
    )
    if changes:
        _check_rewrappable(model, learns)
    set_experts_enabled(inner, stage.experts)
    for module in inner.modules():
        if isinstance(module, AuxiliaryLoss):
            module.config = stage.auxiliary
        if type(module) is dlrm.SparseArch:
            module.__class__ = SparseArch  # the same, with a switch
        if isinstance(module, SparseArch):
            module.frozen = freezes
    for parameter, value in learns.items():
        parameter.requires_grad_(value)
    frozen = [parameter for parameter, value in learns.items() if not value]
    for parameter in (*frozen, *(part_parameters(inner)["tables"].values() if freezes else ())):
        parameter.grad = None  # of the stage before: no optimizer of this one clears it
    set_train_mode(model, stage)
    if changes:
        _rewrap(model)


def _what_is_to_learn(
    model: nn.Module, stage: StageConfig, planned: set[str]
) -> dict[nn.Parameter, bool]:
    """Whether a gradient is wanted of each parameter in DDP."""
    frozen = _frozen_by_owner(model, planned)
    return {
        parameter: part in stage.train and _takes_part(part, stage) and name not in frozen
        for part, parameters in part_parameters(model).items()
        for name, parameter in parameters.items()
        if name not in planned
    }


def _frozen_by_owner(model: nn.Module, planned: set[str]) -> set[str]:
    """Names of the parameters in DDP that were frozen before any stage; the model remembers."""
    if not hasattr(model, _FROZEN):
        names = {name for name, p in model.named_parameters() if not p.requires_grad}
        setattr(model, _FROZEN, names - planned)
    return cast(set[str], getattr(model, _FROZEN))


def _check_freezable(model: nn.Module, tables: set[str]) -> None:
    for path, module in model.named_modules():
        if type(module) is dlrm.SparseArch or isinstance(module, SparseArch):
            tables = {name for name in tables if not name.startswith(f"{path}.")}
    if tables:
        outside = sorted({name.rsplit(".", 3)[0] for name in tables})
        raise ConfigError(
            f"train: without tables, which cannot be frozen in {', '.join(outside)}: only those in "
            "a torchrec_hilomoe.models.SparseArch can. Use one, or let every stage train the tables"
        )


def _check_rewrappable(model: DistributedModelParallel, dense: Iterable[nn.Parameter]) -> None:
    if isinstance(model._dmp_wrapped_module, FullyShardedDataParallel) or any(
        isinstance(parameter, DTensor) for parameter in dense
    ):
        raise ConfigError(
            "train: a stage in which something else learns wraps the dense part anew, and one "
            "under FSDP cannot be; take TorchRec's DefaultDataParallelWrapper, or let all stages "
            "train the same parts, with experts"
        )


def _takes_part(part: str, stage: StageConfig) -> bool:
    """Parameters that the forward pass does not touch must not wait for a gradient in DDP."""
    return stage.experts or part not in ("experts", "router")


def set_train_mode(model: DistributedModelParallel, stage: StageConfig) -> None:
    """Train mode, except for the statistics of frozen batch norms.

    Args:
        model (DistributedModelParallel): the model, for instance after an evaluation.
        stage (StageConfig): the stage it trains in.
    """
    model.train()
    if "backbone" not in stage.train:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def unwrap(model: DistributedModelParallel) -> DLRM_HiLoMoETrain:
    """The train wrapper inside DMP and DDP.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`.

    Returns:
        DLRM_HiLoMoETrain: its parameters are those of ``model``.
    """
    return cast(DLRM_HiLoMoETrain, model.module)


def core_model(model: DistributedModelParallel) -> InteractionDLRM:
    """The model inside DMP, DDP and the train wrapper.

    Args:
        model (DistributedModelParallel): as `build_sharded` makes it.

    Returns:
        InteractionDLRM: its parameters are those of ``model``.
    """
    return cast(InteractionDLRM, unwrap(model).model)


def runnable_stages(
    model: DistributedModelParallel, stages: Mapping[str, StageConfig]
) -> dict[str, StageConfig]:
    """Leaves out stages in which the model has nothing to learn, such as experts, with a notice.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`.
        stages (Mapping[str, StageConfig]): by name, in order.

    Returns:
        dict[str, StageConfig]: those that train a part of which the model has parameters.

    Raises:
        ConfigError: none is left.
    """
    # Tables may all be on other ranks.
    has = {part for part, own in part_parameters(unwrap(model)).items() if own} | {"tables"}
    runnable = {
        name: stage
        for name, stage in stages.items()
        if any(part in has and _takes_part(part, stage) for part in stage.train)
    }
    for name in stages.keys() - runnable.keys():
        missing = " and ".join(stages[name].train)
        logger.info("stage %s is skipped: the model has no parameters of %s", name, missing)
    if not runnable:
        raise ConfigError(
            "training.stages: the model has no parameters of what the stages train, such as "
            "experts in a model without"
        )
    return runnable


def _rewrap(model: DistributedModelParallel) -> None:
    """Wraps the unsharded part in DDP anew, for the parameters that now need a gradient."""
    if isinstance(model._dmp_wrapped_module, DistributedDataParallel):
        model._dmp_wrapped_module = model._dmp_wrapped_module.module
    planned = planned_tables(model)
    if any(p.requires_grad for name, p in model.named_parameters() if name not in planned):
        model._data_parallel_wrapper.wrap(model, model._env, model.device)
