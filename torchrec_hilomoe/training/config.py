"""Configuration of a training run: stages, optimizers, schedule, sharding, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from torchrec_hilomoe.config import STRICT
from torchrec_hilomoe.modules import AuxiliaryLossConfig, DensePart
from torchrec_hilomoe.modules.checks import check_choice, check_number, check_whole

Part = Literal["tables", DensePart]
PARTS: tuple[Part, ...] = get_args(Part)

ShardingType = Literal[
    "auto",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]

DenseOptimizer = Literal["sgd", "adagrad", "adam"]
TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
Kernel = Literal["fused", "dense"]

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: Of minutes and GiB that become whole numbers of a limited size.
Amount = Annotated[float, Field(gt=0, le=1_000_000)]


@dataclass
class StageConfig:
    """One stage of a training.

    Attributes:
        train (list[Part]): the parts that learn; all others are frozen bit for bit.
        experts (bool): whether the experts take part in the forward pass. False costs nothing
            beyond the base weights.
        epochs (float | None): length in epochs, fractions allowed.
        batches (int | None): length in global batches. Give one of ``epochs`` and ``batches``.
        learning_rate_scale (dict[Part, float]): factor on a part's learning rate, 1 if absent.
        auxiliary (AuxiliaryLossConfig): weights of the auxiliary losses.
    """

    __pydantic_config__ = STRICT

    train: list[Part] = field(default_factory=lambda: list(PARTS))
    experts: bool = True
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batches: PositiveInt | None = None
    learning_rate_scale: dict[Part, Rate] = field(default_factory=dict)
    auxiliary: AuxiliaryLossConfig = field(default_factory=AuxiliaryLossConfig)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.batches is None):
            raise ValueError("give the length of the stage by exactly one of epochs and batches")
        if self.batches is not None:
            check_whole("batches", self.batches, at_least=1)
        if self.epochs is not None:
            check_number("epochs", self.epochs, positive=True)
        for part in self.train:
            check_choice("train", part, PARTS)
        for part, scale in self.learning_rate_scale.items():
            check_choice("learning_rate_scale", part, PARTS)
            check_number(f"learning_rate_scale.{part}", scale)
        if not self.train:
            raise ValueError("train is empty: name the parts that learn")
        if len(set(self.train)) < len(self.train):
            raise ValueError(f"train names a part twice: {', '.join(self.train)}")
        if not self.experts and set(self.train) <= {"experts", "router"}:
            raise ValueError(
                "train names nothing but experts and router, which do not learn with experts=false"
            )


@dataclass
class ScheduleConfig:
    """The learning-rate schedule: one factor on the rates of every part, fused and dense alike.

    Attributes:
        name (str): ``constant``; ``linear`` or ``cosine`` decay to ``final_factor`` at the end of
            the run; ``plateau``: times ``plateau_factor`` after each evaluation that is no new
            best.
        warmup_batches (int): the factor grows linearly from 0 to 1 over so many batches.
        final_factor (float): the factor at the end of a decay.
        plateau_factor (float): see ``plateau``.
    """

    __pydantic_config__ = STRICT

    name: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    warmup_batches: Annotated[int, Field(ge=0)] = 0
    final_factor: Rate = 0.0
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


@dataclass
class TrainingConfig:
    """How long, in which stages, and how often it is evaluated.

    Attributes:
        stages (dict[str, StageConfig]): the stages by name, in order. A stage that trains only
            experts and router is skipped, with a notice, for a model without experts.
        schedule (ScheduleConfig): the learning-rate schedule.
        max_train_batches (int | None): at most so many global batches in each stage.
        max_eval_batches (int | None): at most so many batches in each evaluation.
        evaluations_per_epoch (int): evaluations on valid in each epoch.
        monitor (str): the metric on valid whose best weights are kept, and which the ``plateau``
            schedule and early stopping follow: ``auc``, ``gauc`` (needs ``data.schema.group``) or
            ``logloss``.
        early_stopping_patience (int | None): a stage ends after so many evaluations in a row
            without a new best.
        gradient_clip_norm (float | None): clip the global norm of all dense gradients. Fused
            table gradients never exist as tensors and are not clipped.
        on_non_finite (str): what happens to a batch whose loss or gradients are not finite:
            ``raise`` ends the training; ``skip`` leaves it out on every rank, before anything
            learns from it, and counts it. The first ten are saved in ``OUTPUT_DIR/non_finite``.
            Predictions on valid that are not finite end the training under ``raise`` too; under
            ``skip`` they have no metrics and are never the best.
        log_every (int): batches between two records of the loss.
        timeout_minutes (float): ranks that wait so long for another one end with an error.
    """

    __pydantic_config__ = STRICT

    stages: dict[str, StageConfig]
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_train_batches: PositiveInt | None = None
    max_eval_batches: PositiveInt | None = None
    evaluations_per_epoch: PositiveInt = 1
    monitor: Literal["auc", "gauc", "logloss"] = "auc"
    early_stopping_patience: PositiveInt | None = None
    gradient_clip_norm: PositiveFloat | None = None
    on_non_finite: Literal["raise", "skip"] = "raise"
    log_every: PositiveInt = 20
    timeout_minutes: Amount = 10.0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty: a training needs at least one stage")


@dataclass
class PartOptimizerConfig:
    """The optimizer of one part of the dense model.

    Attributes:
        name (str): ``sgd``, ``adagrad`` or ``adam`` of `torch.optim`.
        learning_rate (float): before the stage's scale and the schedule.
        l2 (float): adds (l2/2)‖θ‖² over the part to the loss.
        eps (float | None): None for the optimizer's own default; sgd has none.
    """

    __pydantic_config__ = STRICT

    name: DenseOptimizer = "adam"
    learning_rate: Rate = 1e-3
    l2: Rate = 0.0
    eps: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_choice("name", self.name, get_args(DenseOptimizer))
        _check_numbers(self)


@dataclass
class TableOptimizerConfig:
    """The optimizer of the embedding tables.

    Attributes:
        name (str): ``rowwise_adagrad``, ``adagrad``, ``sgd`` or ``adam``. Fused Adam exists on
            CUDA only.
        kernel (str): ``fused``: the update runs inside the backward pass and touches only the
            rows of the batch. ``dense``: gradients of whole tables and `torch.optim`, as published
            benchmarks have it; for tables that fit each rank.
        learning_rate (float): before the stage's scale and the schedule.
        l2 (float): adds (l2/2)‖E‖² over whole tables to the loss; ``dense`` only.
        eps (float | None): None for the kernel's own default: 1e-8 where it is fused, for Adagrad
            and row-wise Adagrad 1e-10 where it is dense, as under ``data_parallel``; sgd has none.
    """

    __pydantic_config__ = STRICT

    name: TableOptimizer = "rowwise_adagrad"
    kernel: Kernel = "fused"
    learning_rate: Rate = 0.05
    l2: Rate = 0.0
    eps: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_choice("name", self.name, get_args(TableOptimizer))
        check_choice("kernel", self.kernel, get_args(Kernel))
        _check_numbers(self)
        if self.l2 and self.kernel == "fused":
            raise ValueError("l2 covers whole tables and needs kernel=dense")


def _check_numbers(optimizer: PartOptimizerConfig | TableOptimizerConfig) -> None:
    check_number("learning_rate", optimizer.learning_rate)
    check_number("l2", optimizer.l2)
    if optimizer.eps is not None:
        check_number("eps", optimizer.eps, positive=True)
        if optimizer.name == "sgd":
            raise ValueError("eps: sgd has no eps")


@dataclass
class OptimizerConfig:
    """One optimizer for each part.

    Attributes:
        tables (TableOptimizerConfig): the embedding tables.
        backbone (PartOptimizerConfig): dense arch, base weights, over arch.
        experts (PartOptimizerConfig): expert factors U and V.
        router (PartOptimizerConfig): router keys and query projections.
    """

    __pydantic_config__ = STRICT

    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    backbone: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    experts: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)
    router: PartOptimizerConfig = field(default_factory=PartOptimizerConfig)


@dataclass
class ShardingConfig:
    """How the tables are spread over the ranks.

    Attributes:
        type (ShardingType): TorchRec's sharding type of every table; ``auto`` lets the planner
            choose. ``data_parallel`` replicates the tables and trains them with dense optimizers.
            Row-wise types and ``grid_shard`` place a table whole whose rows would not reach every
            rank.
        memory_per_rank_gib (float | None): what the planner may fill, of the GPU or, on CPU, of
            main memory; None for its own assumption.
    """

    __pydantic_config__ = STRICT

    type: ShardingType = "auto"
    memory_per_rank_gib: Amount | None = None

    def __post_init__(self) -> None:
        check_choice("type", self.type, get_args(ShardingType))
        if self.memory_per_rank_gib is not None:
            check_number("memory_per_rank_gib", self.memory_per_rank_gib, positive=True)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and what a run starts from.

    Besides the times given here one is written at the end of each stage, at each new best on
    valid, and on SIGTERM and SIGINT.

    Attributes:
        resume (str): ``auto``: go on from the newest whole checkpoint in the output folder, if
            there is one; ``never``: begin anew and replace what is there; or the path of a
            checkpoint to go on from. A launch that torchrun restarts does not begin anew again,
            and a run that is started again with the same path goes on from its own newest.
        warm_start (Path | None): a checkpoint whose weights, and nothing else, a new run starts
            from; values take their embeddings along where vocabularies differ. Not read by a run
            that resumes.
        strict (bool): a warm start fails if features are others, or weights are missing,
            unexpected or of another shape; else these are reported.
        every_batches (int | None): batches between two checkpoints.
        every_minutes (float | None): minutes between two checkpoints, by rank 0's clock.
        keep_last (int): so many are kept, and the best one.
    """

    __pydantic_config__ = STRICT

    resume: str = "auto"
    warm_start: Path | None = None
    strict: bool = True
    every_batches: PositiveInt | None = None
    every_minutes: PositiveFloat | None = 15.0
    keep_last: PositiveInt = 2
