"""Interaction architectures by name; third parties register their own."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from torchrec_hilomoe.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class InteractionContext:
    """What a builder is told of the model around the interaction.

    Attributes:
        num_sparse_features (int): F of the ``sparse_features`` [B, F, D] it will be handed.
        embedding_dim (int): D.
        device (torch.device | None): device of the parameters.
    """

    num_sparse_features: int
    embedding_dim: int
    device: torch.device | None = None

    @property
    def in_features(self) -> int:
        """Width of the dense and sparse features concatenated: (F + 1) * D."""
        return (self.num_sparse_features + 1) * self.embedding_dim


class Interaction(NamedTuple):
    """A built interaction architecture.

    Attributes:
        module (nn.Module): ``(dense_features [B, D], sparse_features [B, F, D]) → [B, width]``.
        out_features (int): the width.
    """

    module: nn.Module
    out_features: int


@dataclass(frozen=True)
class Entry(Generic[C]):
    """A registered architecture: the dataclass of its options, and its builder."""

    config: type[C]
    build: Callable[[InteractionContext, C], Interaction]


_ENTRIES: dict[str, Entry[Any]] = {}


def register_interaction(
    name: str, config: type[C]
) -> Callable[
    [Callable[[InteractionContext, C], Interaction]],
    Callable[[InteractionContext, C], Interaction],
]:
    """Registers an interaction architecture under a name, for ``model.name`` in the configs.

    Args:
        name (str): the name.
        config (type): a dataclass of the architecture's options; its fields become keys of
            ``model`` in the configs and are validated.

    Returns:
        Callable: a decorator for the builder ``(InteractionContext, config) → Interaction``.

    Raises:
        ValueError: the name is taken by another builder.
        TypeError: ``config`` is no dataclass.

    Example:
        >>> import dataclasses
        >>> from torchrec.models.dlrm import InteractionArch
        >>> @dataclasses.dataclass
        ... class DotConfig:
        ...     scale: float = 1.0
        >>> @register_interaction("my_dot", DotConfig)
        ... def build_my_dot(context, config):
        ...     f = context.num_sparse_features
        ...     width = context.embedding_dim + f * (f + 1) // 2
        ...     return Interaction(InteractionArch(f), width)
        >>> get_interaction("my_dot").build(InteractionContext(3, 8), DotConfig()).out_features
        14
    """

    def register(
        build: Callable[[InteractionContext, C], Interaction],
    ) -> Callable[[InteractionContext, C], Interaction]:
        if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
            raise TypeError(f"interaction {name!r}: config must be a dataclass, got {config!r}")
        taken = _ENTRIES.get(name)
        if taken is not None and _origin(taken.build) != _origin(build):
            raise ValueError(f"interaction {name!r} is already registered: {taken.build}")
        _ENTRIES[name] = Entry(config, build)
        return build

    return register


def _origin(build: Callable[..., Any]) -> tuple[object, ...]:
    """What tells a builder from others, and not from itself in a module imported again."""
    if not hasattr(build, "__qualname__"):  # such as a functools.partial
        return (build,)
    line = build.__code__.co_firstlineno if build.__name__ == "<lambda>" else None
    return build.__module__, build.__qualname__, line


def get_interaction(name: str) -> Entry[Any]:
    """Looks a registered architecture up.

    Args:
        name (str): the name it was registered under.

    Returns:
        Entry: its config dataclass and builder.

    Raises:
        ConfigError: no such name; the message lists those that exist.
    """
    if name not in _ENTRIES:
        close = difflib.get_close_matches(name, _ENTRIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"model.name: no interaction {name!r}; {hint}Registered: "
            f"{', '.join(interaction_names())}. Import the module that registers yours, or name it "
            "in `plugins`."
        )
    return _ENTRIES[name]


def interaction_names() -> list[str]:
    """Names of all registered architectures, sorted."""
    return sorted(_ENTRIES)


def _is_module_name(name: object) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def import_plugins(modules: list[str] | None) -> None:
    """Imports the modules that register third parties' architectures.

    Args:
        modules (list[str] | None): dotted module names, importable from where Python runs; as the
            key ``plugins`` of a configuration has them.

    Raises:
        ConfigError: it is no list of names, or a module cannot be imported.
    """
    modules = [] if modules is None else modules
    if not (isinstance(modules, list) and all(map(_is_module_name, modules))):
        raise ConfigError(f"plugins: a list of module names, such as [my_module]; got {modules!r}")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"plugins: cannot import {module!r} ({error}); install it or add its folder to "
                "PYTHONPATH"
            ) from error
