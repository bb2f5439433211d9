"""A model from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter
from pydantic_core import PydanticSerializationError
from torch import nn
from torchrec.models.dlrm import DenseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_hilomoe.config import STRICT, parse_config, unknown_key
from torchrec_hilomoe.errors import ConfigError
from torchrec_hilomoe.models.contract import check_interaction
from torchrec_hilomoe.models.dlrm import InteractionDLRM
from torchrec_hilomoe.models.ensemble import EnsembleInteractionArch, EnsembleOverArch
from torchrec_hilomoe.models.over_arch import OverArch
from torchrec_hilomoe.models.registry import InteractionContext, get_interaction


@dataclass
class ModelConfig:
    """A CTR model: tables, dense arch, interaction, over arch.

    Defaults are those of ``model=hilomoe``; other models in ``conf/model`` set widths of their own.

    Attributes:
        name (str): the registered interaction architecture.
        embedding_dim (int): D, the embedding dimension of every table; of each member's part of it
            in an ensemble.
        embedding_init_std (float | None): initialise tables from N(0, std²); None for TorchRec's
            uniform(-1/√n, 1/√n) over n rows.
        dense_arch_layer_sizes (list[int]): hidden widths of the dense arch; D is appended.
        over_arch_layer_sizes (list[int]): hidden widths of the over arch; 1 is appended.
        batch_norm (bool): batch normalisation in the over arch.
        dropout (float): dropout in the over arch.
        ensemble_size (int): S, members of an ensemble. Each has D columns of the tables, an
            interaction and an over arch of its own and learns by its own loss; the model predicts
            the mean of their probabilities. 1 is no ensemble.
        interaction (Any): options of the interaction: an instance of its registered dataclass.
    """

    __pydantic_config__ = STRICT

    name: str = "hilomoe"
    embedding_dim: PositiveInt = 16
    embedding_init_std: PositiveFloat | None = None
    dense_arch_layer_sizes: list[PositiveInt] = field(default_factory=lambda: [64])
    over_arch_layer_sizes: list[PositiveInt] = field(default_factory=list)
    batch_norm: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ensemble_size: PositiveInt = 1
    interaction: Any = None

    @property
    def table_dim(self) -> int:
        """Columns of every table: those of all members."""
        return self.embedding_dim * self.ensemble_size


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Builds the `ModelConfig` from flat keys.

    Keys of `ModelConfig` and of the named interaction's own dataclass stand side by side, so that
    ``model.num_experts=16`` sets an option of the interaction.

    Args:
        values (Mapping[str, Any]): plain values; ``name`` selects the interaction.

    Returns:
        ModelConfig: with ``interaction`` filled.

    Raises:
        ConfigError: an unknown name or key, a value that does not fit, or one that a checkpoint
            cannot hold.

    Example:
        >>> config = parse_model_config({"name": "dcn", "embedding_dim": 8, "num_layers": 2})
        >>> config.interaction
        DCNOptions(num_layers=2, low_rank_dim=64)
    """
    config = _parse(values)
    saved = model_config_dict(config)
    try:
        _parse(saved)
    except ConfigError as error:
        raise ConfigError(
            f"model.name={config.name}: a checkpoint cannot hold its options, which are not read "
            f"back from JSON: {error}"
        ) from None
    return config


def _parse(values: Mapping[str, Any]) -> ModelConfig:
    if not isinstance(values, Mapping):
        raise ConfigError(f"model: expected its keys and values, got {values!r}")
    name = str(values.get("name", ModelConfig.name))
    entry = get_interaction(name)
    common = {f.name for f in dataclasses.fields(ModelConfig)} - {"interaction"}
    own = {f.name for f in dataclasses.fields(entry.config) if f.init}
    unknown = sorted(set(values) - common - own)
    if unknown:
        raise ConfigError(
            unknown_key(f"model.{unknown[0]}", sorted(common | own), f" for model.name={name}")
        )
    config = parse_config(ModelConfig, {k: values[k] for k in common & set(values)}, "model")
    config.interaction = parse_config(
        entry.config, {k: values[k] for k in own & set(values)}, "model"
    )
    return config


def model_config_dict(config: ModelConfig) -> dict[str, Any]:
    """The flat mapping that `parse_model_config` reads back: for saving beside the weights.

    Args:
        config (ModelConfig): a configuration.

    Returns:
        dict[str, Any]: values as JSON holds them; of an Enum its value, of a Path its text.

    Raises:
        ConfigError: JSON cannot hold an option.
    """
    values = _plain(dataclasses.replace(config, interaction=None))
    del values["interaction"]
    return values | _plain(config.interaction)


def _plain(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that it is made from, as JSON holds them."""
    adapter = TypeAdapter(type(config))
    values: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(config) if f.init):
        try:
            values |= adapter.dump_python(config, mode="json", include={name}, warnings=False)
        except PydanticSerializationError as error:
            raise ConfigError(
                f"model.{name}: a checkpoint cannot hold {getattr(config, name)!r} ({error}); give "
                "the option a type that pydantic writes as JSON, such as numbers, text, Enum or "
                "Path"
            ) from None
    return values


def build_model(
    config: ModelConfig,
    embedding_bag_collection: EmbeddingBagCollection,
    num_dense_features: int,
    device: torch.device | None = None,
) -> InteractionDLRM:
    """Builds the model around given tables.

    Args:
        config (ModelConfig): from `parse_model_config`.
        embedding_bag_collection (EmbeddingBagCollection): tables of ``table_dim`` columns.
        num_dense_features (int): dense features of the data, 0 if there are none.
        device (torch.device | None): device of everything but the tables.

    Returns:
        InteractionDLRM: the model.

    Raises:
        ConfigError: an option does not fit the data or the tables, or a builder of a third party
            does not return what it promises.
    """
    tables = embedding_bag_collection.embedding_bag_configs()
    others = {t.name: t.embedding_dim for t in tables if t.embedding_dim != config.table_dim}
    if others:
        raise ConfigError(
            f"model.embedding_dim: tables need embedding_dim * ensemble_size = {config.table_dim} "
            f"columns, got {others}"
        )
    num_sparse = sum(len(table.feature_names) for table in tables)
    dense_arch = None
    if num_dense_features:
        sizes = [*config.dense_arch_layer_sizes, config.table_dim]
        dense_arch = DenseArch(num_dense_features, sizes, device)
    context = InteractionContext(
        num_sparse if dense_arch is not None else num_sparse - 1, config.embedding_dim, device
    )
    members = [_build_member(config, context) for _ in range(config.ensemble_size)]
    inter_arch, over_arch = members[0]
    if config.ensemble_size > 1:
        inter_arch = EnsembleInteractionArch([inter for inter, _ in members])
        over_arch = EnsembleOverArch([over for _, over in members])
    return InteractionDLRM(embedding_bag_collection, dense_arch, inter_arch, over_arch)


def _build_member(config: ModelConfig, context: InteractionContext) -> tuple[nn.Module, nn.Module]:
    """Interaction and over arch."""
    built = get_interaction(config.name).build(context, config.interaction)
    interaction = check_interaction(config.name, built, context)
    over_arch = OverArch(
        interaction.out_features,
        [*config.over_arch_layer_sizes, 1],
        batch_norm=config.batch_norm,
        dropout=config.dropout,
        device=context.device,
    )
    return interaction.module, over_arch
