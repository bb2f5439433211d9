"""Training: stages, optimizers, sharding, checkpoints, metrics, and whole runs."""

from torchrec_hilomoe.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    PartOptimizerConfig,
    ScheduleConfig,
    ShardingConfig,
    StageConfig,
    TableOptimizerConfig,
    TrainingConfig,
)
from torchrec_hilomoe.training.distributed import (
    broadcast,
    init_process_group,
    is_main_rank,
    once_per_launch,
    shutdown,
)
from torchrec_hilomoe.training.evaluation import predict
from torchrec_hilomoe.training.interruption import TrainingInterrupted
from torchrec_hilomoe.training.loop import Trainer
from torchrec_hilomoe.training.metrics import Predictions, grouped_auc
from torchrec_hilomoe.training.optimizers import StageOptimizer, part_parameters
from torchrec_hilomoe.training.run import RunConfig, build_sharded, parse_run_config, train
from torchrec_hilomoe.training.schedule import LearningRateSchedule
from torchrec_hilomoe.training.score import ScoreConfig, score
from torchrec_hilomoe.training.sharding import shard_model
from torchrec_hilomoe.training.stages import enter_stage
from torchrec_hilomoe.training.tables import init_tables, make_tables

__all__ = [
    "CheckpointConfig",
    "LearningRateSchedule",
    "OptimizerConfig",
    "PartOptimizerConfig",
    "Predictions",
    "RunConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "ShardingConfig",
    "StageConfig",
    "StageOptimizer",
    "TableOptimizerConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingInterrupted",
    "broadcast",
    "build_sharded",
    "enter_stage",
    "grouped_auc",
    "init_process_group",
    "init_tables",
    "is_main_rank",
    "make_tables",
    "once_per_launch",
    "parse_run_config",
    "part_parameters",
    "predict",
    "score",
    "shard_model",
    "shutdown",
    "train",
]
