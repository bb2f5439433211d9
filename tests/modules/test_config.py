from __future__ import annotations

import re

import numpy as np
import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.modules import AuxiliaryLossConfig, HiLoMoEConfig, HiLoMoELinear


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_experts": -1}, "num_experts must be at least 1, got -1"),
        ({"num_experts": 4, "top_k": 5}, "top_k must lie in 1..num_experts (4), got 5"),
        ({"top_k": 0}, "top_k must lie in 1..num_experts (8), got 0"),
        ({"query_dim": 0}, "query_dim must be at least 1, got 0"),
        ({"query_dim": 8, "tied_keys": True}, "query_dim has no meaning with tied_keys"),
        ({"query_dropout": 1.0}, "query_dropout must lie in [0, 1), got 1.0"),
        ({"expert_dropout": -0.1}, "expert_dropout must lie in [0, 1), got -0.1"),
        ({"gate_scale": 0.0}, "gate_scale must be positive and finite, got 0.0"),
        ({"gate_scale": float("inf")}, "gate_scale must be positive and finite, got inf"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HiLoMoEConfig(**values)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(HiLoMoEConfig, values, "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 2.0}, "num_layers must be a whole number, got 2.0"),
        ({"num_experts": True}, "num_experts must be a whole number, got True"),
        ({"num_experts": "4"}, "num_experts must be a whole number, got '4'"),
        ({"top_k": 2.0}, "top_k must be a whole number, got 2.0"),
        ({"query_dim": float("nan")}, "query_dim must be a whole number, got nan"),
        ({"tied_keys": "no"}, "tied_keys must be True or False, got 'no'"),
        ({"recompute": 2}, "recompute must be True or False, got 2"),
        ({"query_dropout": "0"}, "query_dropout must be a number, got '0'"),
        ({"gate_scale": True}, "gate_scale must be a number, got True"),
    ],
)
def test_values_of_another_type_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HiLoMoEConfig(**values)


def test_numbers_of_numpy_are_numbers() -> None:
    config = HiLoMoEConfig(num_layers=np.int64(2), gate_scale=np.float32(3.0))
    assert HiLoMoELinear(4, 2, config).gate_scale == 3.0


@pytest.mark.parametrize("name", ["load_balance", "z_loss", "diversity"])
def test_loss_weights_out_of_range_are_named(name: str) -> None:
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
            AuxiliaryLossConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a number, got '1'"):
        AuxiliaryLossConfig(**{name: "1"})


def test_unknown_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_experts'"):
        parse_config(HiLoMoEConfig, {"num_expert": 4}, "model")
