"""Plain mappings (YAML, JSON, Hydra) to validated dataclasses; errors name the key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from torchrec_hilomoe.errors import ConfigError

T = TypeVar("T")

#: Set as ``__pydantic_config__`` on every config dataclass: unknown keys are errors.
STRICT = ConfigDict(extra="forbid")


def parse_config(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds the config dataclass ``cls`` from a plain mapping and validates every value.

    Args:
        cls (type[T]): a dataclass (nested dataclasses are built too).
        values (Mapping[str, Any]): plain values, as YAML gives them.
        prefix (str): dotted path of ``values`` in the whole config, for error messages.

    Returns:
        T: an instance of ``cls``.

    Raises:
        ConfigError: a key is unknown or missing, or a value does not fit its field.
            Each problem is named by its dotted key.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Optim:
        ...     __pydantic_config__ = STRICT
        ...     lr: float = 0.1
        >>> parse_config(Optim, {"lr": 0.5}, "optimizer")
        Optim(lr=0.5)
        >>> try:
        ...     parse_config(Optim, {"lrr": 0.5}, "optimizer")
        ... except ConfigError as error:
        ...     print(error)
        optimizer.lrr: unknown key; did you mean 'lr'? Known keys: lr
    """
    try:
        plain = dict(values) if isinstance(values, Mapping) else values
        return TypeAdapter(cls).validate_python(plain)
    except ValidationError as error:
        problems = [_describe(cls, problem, prefix) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted keys.

    Args:
        values (Mapping[str, Any]): such as a configuration.
        prefix (str): stands before every key.

    Yields:
        tuple[str, Any]: key and value.

    Example:
        >>> dict(flat_keys({"seed": 1, "data": {"batch_size": 512}}))
        {'seed': 1, 'data.batch_size': 512}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unknown_key(path: str, known: Sequence[str], where: str = "") -> str:
    """The message about a key that does not exist.

    Args:
        path (str): the dotted key.
        known (Sequence[str]): the keys that could stand in its place.
        where (str): under what they are known, such as " for model.name=dcn".

    Returns:
        str: with the known key that is close to it, if there is one.

    Example:
        >>> unknown_key("optimizer.lrr", ["lr", "eps"])
        "optimizer.lrr: unknown key; did you mean 'lr'? Known keys: lr, eps"
    """
    close = difflib.get_close_matches(path.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{path}: unknown key{where}{hint} Known keys: {', '.join(known)}"


def _describe(cls: type, problem: Any, prefix: str) -> str:
    """One readable line for one pydantic problem."""
    # Of the alternatives of a union pydantic names each by its type: not a part of the path.
    location = [part for part in problem["loc"] if not _is_tag(part)]
    path = ".".join(str(part) for part in (*prefix.split("."), *location) if part != "")
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(path, _known_keys(cls, problem["loc"][:-1]))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    if message.split(" ")[0].rstrip(":") in _known_keys(cls, problem["loc"]):
        return f"{path}.{message}"  # from a __post_init__ that names the field
    if isinstance(problem["input"], Mapping) or problem["input"] is None and not problem["loc"]:
        return f"{path}: {message}"
    return f"{path}: {message} (got {problem['input']!r})"


def _is_tag(part: Any) -> bool:
    return part in ("str", "int", "float", "bool", "[key]") or str(part).startswith("list[")


def _known_keys(cls: Any, path: tuple[Any, ...]) -> list[str]:
    """Field names of the dataclass reached from ``cls`` by ``path``, where it can be reached."""
    for part in path:
        if isinstance(part, int) or not dataclasses.is_dataclass(cls):
            continue
        cls = typing.get_type_hints(cls).get(part, cls)
        candidates = [cls, *typing.get_args(cls)]
        candidates += [arg for c in candidates for arg in typing.get_args(c)]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), cls)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
