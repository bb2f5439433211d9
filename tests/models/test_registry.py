from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from torch import nn

from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models import (
    Interaction,
    build_model,
    import_plugins,
    interaction_names,
    parse_model_config,
    register_interaction,
)
from torchrec_hilomoe.models.interactions import InteractionCatArch


@dataclass
class Options:
    width: int = 3


def test_third_party_interaction_is_built_by_name(collection, make_features):
    @register_interaction("thirds", Options)
    def build_thirds(context, config):
        return Interaction(
            InteractionCatArch(nn.Linear(context.in_features, config.width)), config.width
        )

    assert "thirds" in interaction_names()
    config = parse_model_config({"name": "thirds", "embedding_dim": 8, "width": 7})
    model = build_model(config, collection, 0)
    assert model.inter_arch.tower.out_features == 7
    assert model(None, make_features()).shape == (6, 1)


def test_name_is_taken_once():
    with pytest.raises(ValueError, match="'dlrm' is already registered"):
        register_interaction("dlrm", Options)(lambda context, config: None)


def test_builder_may_be_a_partial():
    def build(context, config, out_features):
        return Interaction(nn.Identity(), out_features)

    register_interaction("partial", Options)(functools.partial(build, out_features=3))
    assert "partial" in interaction_names()
    with pytest.raises(ValueError, match="'partial' is already registered"):
        register_interaction("partial", Options)(functools.partial(build, out_features=4))


def test_two_lambdas_are_two_builders():
    register_interaction("lambda", Options)(lambda context, config: None)
    with pytest.raises(ValueError, match="'lambda' is already registered"):
        register_interaction("lambda", Options)(lambda context, config: None)


def test_options_are_a_dataclass():
    with pytest.raises(TypeError, match="'no_dataclass': config must be a dataclass, got <class"):
        register_interaction("no_dataclass", dict)(lambda context, config: None)


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"no interaction 'hilomo'; did you mean 'hilomoe'\?"):
        parse_model_config({"name": "hilomo"})


def test_missing_plugin_is_named():
    with pytest.raises(ConfigError, match="plugins: cannot import 'no_such_module'"):
        import_plugins(["no_such_module"])


def test_plugins_are_a_list_of_names():
    for wrong in ("my_module", [1], [""], ["."], [".relative"]):
        with pytest.raises(ConfigError, match="plugins: a list of module names, such as"):
            import_plugins(wrong)
    import_plugins(None)
