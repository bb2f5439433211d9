"""One optimizer for a stage: fused tables, dense parts, L2, clipping and the schedule together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torchrec
from torch import distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.modules import parameter_part
from torchrec_hilomoe.training.config import (
    PARTS,
    OptimizerConfig,
    Part,
    PartOptimizerConfig,
    StageConfig,
    TableOptimizerConfig,
)
from torchrec_hilomoe.training.tables import COLLECTIONS

#: Optimizer classes by their names in configurations.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
}
#: Those of them that have a fused kernel on every device: Adam steps in a fifth of the time.
_ONE_KERNEL = ("sgd", "adam")


def table_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are embedding tables.

    Args:
        model (nn.Module): plain, or wrapped by `DistributedModelParallel`.

    Returns:
        set[str]: all parameters of TorchRec's embedding (bag) collections, sharded or not, by
        their names in ``model.named_parameters()``.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, COLLECTIONS)
        for parameter in module.parameters()
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def part_parameters(model: nn.Module) -> dict[Part, dict[str, nn.Parameter]]:
    """Parameters of a model by part.

    Args:
        model (nn.Module): plain, or wrapped by `DistributedModelParallel`.

    Returns:
        dict[Part, dict[str, nn.Parameter]]: by part, then by name. Tables without a local shard
            on this rank are left out.
    """
    of_name, tables = parameter_part(model), table_names(model)
    parts: dict[Part, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        part: Part = "tables" if name in tables else of_name[name]
        if parameter.numel() > 0:
            parts[part][name] = parameter
    return parts


def planned_tables(model: DistributedModelParallel) -> set[str]:
    """Names of the tables that the plan places; DDP replicates all others with the dense part.

    Args:
        model (DistributedModelParallel): the model.

    Returns:
        set[str]: some of `table_names`.
    """
    return _planned(model, lambda table: True)


def fused_modules(model: DistributedModelParallel) -> Iterator[Any]:
    """FBGEMM's modules, which update the tables of this rank in their backward pass.

    Their ``iter`` counts forward passes, is in no state dict, and decides Adam's step size.

    Args:
        model (DistributedModelParallel): the model.

    Yields:
        SplitTableBatchedEmbeddingBagsCodegen: none on a rank without fused tables.
    """

    def modules(optimizer: KeyedOptimizer) -> Iterator[Any]:
        if isinstance(optimizer, CombinedOptimizer):
            for _, inner in optimizer.optimizers:
                yield from modules(inner)
        elif hasattr(optimizer, "_emb_module"):
            yield optimizer._emb_module

    yield from modules(model.fused_optimizer)


class StageOptimizer:
    """What a train pipeline calls the optimizer, for one stage.

    Tables with a fused kernel learn in the backward pass, by the optimizer that was fused into
    them, at the one rate that ``config`` has for tables; those whose plan has the kernel ``dense``
    (data parallel ones have), or that no plan has, by a dense optimizer.

    Args:
        model (DistributedModelParallel): the model; only the stage's parts are stepped.
        config (OptimizerConfig): optimizers of the parts.
        stage (StageConfig): which parts learn, at which scale.
        gradient_clip_norm (float | None): largest global norm of all dense gradients.

    Raises:
        ConfigError: tables are to have L2, and some have a fused kernel, which knows of none.

    Attributes:
        factor (float): the schedule's factor on every rate. Fused tables, which learn in the
            backward pass, read it in the `zero_grad` or `step` before that.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        config: OptimizerConfig,
        stage: StageConfig,
        *,
        gradient_clip_norm: float | None = None,
    ) -> None:
        self.factor = 1.0
        self._clip = gradient_clip_norm
        self._rates: list[tuple[dict, float]] = []
        self._l2: list[tuple[list[nn.Parameter], float]] = []
        self._optimizers: list[tuple[str, KeyedOptimizer]] = []
        self._dense: list[tuple[str, KeyedOptimizer]] = []
        fused, sharded = _planned(model, _is_fused), _planned(model, _is_sharded)
        self._sharded: list[nn.Parameter] = []
        self._replicated: list[nn.Parameter] = []
        for part, parameters in part_parameters(model).items():
            if part not in stage.train:
                continue
            own: TableOptimizerConfig | PartOptimizerConfig = getattr(config, part)
            rate = own.learning_rate * stage.learning_rate_scale.get(part, 1.0)
            if part == "tables":
                if any(map(_is_fused, _plans(model))):
                    if own.l2:
                        raise ConfigError(
                            f"optimizer.tables.l2: {own.l2:g} needs tables with the kernel dense, "
                            "and the plan has fused ones"
                        )
                    self._add("tables", model.fused_optimizer, rate)
                parameters = {name: p for name, p in parameters.items() if name not in fused}
            if parameters:
                optimizer = _dense_optimizer(parameters, own)
                self._add(part, optimizer, rate)
                self._dense.append((part, optimizer))
                if own.l2:
                    self._l2.append((list(parameters.values()), own.l2))
                for name, parameter in parameters.items():
                    (self._sharded if name in sharded else self._replicated).append(parameter)
        self._combined = CombinedOptimizer(self._optimizers)
        self.zero_grad()  # fused tables learn at once, in a loop that clears gradients last
        # Every rank has to take part, those without a shard too.
        self._needs_shard_norm = "tables" in stage.train and any(
            not _is_fused(table) and _is_sharded(table) for table in _plans(model)
        )

    def _add(self, part: str, optimizer: KeyedOptimizer, rate: float) -> None:
        self._optimizers.append((part, optimizer))
        self._rates.extend((group, rate) for group in optimizer.param_groups)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each part at the next step."""
        return {
            part: next((g["lr"] for g in optimizer.param_groups), 0.0)
            for part, optimizer in self._optimizers
        }

    def _set_rates(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate * self.factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients and sets the rates; fused optimizers read theirs here.

        Args:
            set_to_none (bool): as `torch.optim.Optimizer.zero_grad`.
        """
        self._set_rates()
        self._combined.zero_grad(set_to_none)

    def dense_state(self) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """The dense optimizers' state by part, parameter and name; the tensors themselves."""
        return {part: optimizer.state_dict()["state"] for part, optimizer in self._dense}

    def init_state(
        self, keep: Callable[[str, str], bool] = lambda part, name: True
    ) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """Makes the state that optimizers otherwise make at their first step, to be loaded into.

        Args:
            keep (Callable[[str, str], bool]): whether the parameter of a part had a state.

        Returns:
            dict: as `dense_state`.
        """
        for part, optimizer in self._dense:
            optimizer.init_state()
            optimizer.zero_grad(set_to_none=True)
            for name, parameter in optimizer.params.items():
                if not keep(part, name):
                    optimizer.state.pop(parameter, None)
        return self.dense_state()

    def gradient_norm(self, others: Iterable[torch.Tensor] = ()) -> torch.Tensor:
        """The norm of the gradients that every rank has: those of the dense part.

        Args:
            others (Iterable[torch.Tensor]): gradients of this rank to be counted in.

        Returns:
            torch.Tensor: scalar.
        """
        return torch.nn.utils.get_total_norm([*_gradients(self._replicated), *others])

    def step(self) -> None:
        """Adds the L2 gradients, clips, and steps every optimizer."""
        self._set_rates()
        with torch.no_grad():
            self._add_l2_gradients()
            if self._clip is not None:
                self._clip_gradients(self._clip)
        self._combined.step()

    def _add_l2_gradients(self) -> None:
        for parameters, l2 in self._l2:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=l2)

    def _clip_gradients(self, max_norm: float) -> None:
        """Clips by the norm over all ranks; replicated gradients count once."""
        norm = self.gradient_norm()
        if self._needs_shard_norm:
            squared = torch.nn.utils.get_total_norm(_gradients(self._sharded)).square()
            squared = squared.to(norm.device)
            dist.all_reduce(squared)
            norm = (norm.square() + squared).sqrt()
        torch.nn.utils.clip_grads_with_norm_([*self._replicated, *self._sharded], max_norm, norm)


def _dense_optimizer(
    parameters: dict[str, nn.Parameter], config: TableOptimizerConfig | PartOptimizerConfig
) -> KeyedOptimizerWrapper:
    cls = OPTIMIZERS[config.name]
    kwargs: dict[str, Any] = {"lr": config.learning_rate}
    if config.eps is not None:
        kwargs["eps"] = config.eps
    if config.name in _ONE_KERNEL:
        kwargs["fused"] = True
    return KeyedOptimizerWrapper(parameters, lambda params: cls(params, **kwargs))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _plans(model: DistributedModelParallel) -> Iterator[ParameterSharding]:
    """How each table is sharded; the same on every rank."""
    for module_plan in model.plan.plan.values():
        yield from module_plan.values()


def _is_fused(table: ParameterSharding) -> bool:
    return table.compute_kernel != EmbeddingComputeKernel.DENSE.value


def _is_sharded(table: ParameterSharding) -> bool:
    """Whether each rank holds a different piece."""
    return table.sharding_type != ShardingType.DATA_PARALLEL.value


def _planned(
    model: DistributedModelParallel, chosen: Callable[[ParameterSharding], bool]
) -> set[str]:
    """Names of the table parameters whose plan is chosen."""
    names = set()
    for name in table_names(model):
        table = name.split(".")[-2]
        for path, module_plan in model.plan.plan.items():
            inside = not path or name.startswith(f"{path}.")
            if inside and table in module_plan and chosen(module_plan[table]):
                names.add(name)
    return names
