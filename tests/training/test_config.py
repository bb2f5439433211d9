from __future__ import annotations

import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.training import StageConfig, TrainingConfig


def test_a_stage_in_which_nothing_would_learn_is_refused():
    stage = {"train": ["experts", "router"], "experts": False, "epochs": 1}
    message = "training.stages.only.train names nothing but experts and router"
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainingConfig, {"stages": {"only": stage}}, "training")
    parse_config(StageConfig, {**stage, "train": ["experts", "router", "backbone"]})
