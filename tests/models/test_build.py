"""From plain values to the options of a model, and back for a checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import BeforeValidator

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import (
    build_model,
    interaction_names,
    model_config_dict,
    parse_model_config,
    register_interaction,
)

OWN = interaction_names()


def _never_built(context, config):
    pytest.fail("options are parsed and saved without building their model")


class Kind(enum.Enum):
    MEAN = "mean"
    SUM = "sum"


@dataclass
class RichOptions:
    kind: Kind = Kind.MEAN
    weights: Path = Path("weights.npy")
    names: frozenset[str] = frozenset({"a"})
    sizes: dict[int, float] = field(default_factory=dict)
    width: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.width = len(self.sizes)


def test_options_that_json_does_not_know_are_saved_and_read_back():
    register_interaction("rich", RichOptions)(_never_built)
    given = {"name": "rich", "kind": "sum", "weights": "w.npy", "sizes": {1: 2.0}, "dropout": 0.5}
    config = parse_model_config(given)
    saved = json.loads(json.dumps(model_config_dict(config)))
    assert (saved["kind"], saved["weights"]) == ("sum", "w.npy")
    assert parse_model_config(saved) == config
    assert config.interaction.width == 1


def test_an_option_that_no_checkpoint_can_hold_is_refused_at_the_start():
    @dataclass
    class Options:
        size: int = 3
        dtype: Any = torch.float16

    register_interaction("half", Options)(_never_built)
    with pytest.raises(ConfigError, match=r"model\.dtype: .* cannot hold torch\.float16 \(.*dtype"):
        parse_model_config({"name": "half"})


def _only_text(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("expected text")
    return len(value)


def test_options_that_are_not_read_back_are_refused_at_the_start():
    @dataclass
    class Options:
        size: Annotated[int, BeforeValidator(_only_text)] = 3

    register_interaction("measured", Options)(_never_built)
    with pytest.raises(ConfigError, match=r"model\.name=measured: .*not read back.* model\.size"):
        parse_model_config({"name": "measured", "size": "abc"})


@pytest.mark.parametrize("name", OWN)
def test_own_options_are_saved_as_ever(name):
    """Checkpoints are compared with the run that goes on from them."""
    config = parse_model_config({"name": name})
    flat = dataclasses.asdict(config)
    flat |= flat.pop("interaction")
    assert model_config_dict(config) == json.loads(json.dumps(flat))


def test_batch_norm_and_dropout_are_those_of_every_members_over_arch(collection):
    given = {"name": "dlrm", "embedding_dim": 4, "ensemble_size": 2, "over_arch_layer_sizes": [6]}
    config = parse_model_config({**given, "batch_norm": True, "dropout": 0.25})
    model = build_model(config, collection, num_dense_features=3)
    hidden = ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    for member in model.over_arch.members:
        assert [type(layer).__name__ for layer in member.model] == [*hidden, "Linear"]
        assert member.model[3].p == 0.25


def test_tables_of_other_dimensions_are_refused(collection):
    config = parse_model_config({"name": "hilomoe", "embedding_dim": 4})
    with pytest.raises(ConfigError, match=r"model.embedding_dim: .* = 4 columns, got {'t0': 8,"):
        build_model(config, collection, 0)


@pytest.mark.parametrize("values", ["hilomoe", None, ["hilomoe"]])
def test_what_has_no_keys_is_refused(values):
    with pytest.raises(ConfigError, match=r"model: expected its keys and values, got .*"):
        parse_model_config(values)


def test_a_close_key_is_suggested():
    with pytest.raises(ConfigError, match=r"model\.num_layer: .*; did you mean 'num_layers'\?"):
        parse_model_config({"name": "dcn", "num_layer": 3})
