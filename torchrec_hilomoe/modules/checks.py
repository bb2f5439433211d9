"""Checks of what a constructor is given: the errors name argument and value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

_EXPECTED = {Integral: "a whole number", Real: "a number", bool: "True or False"}


def check_type(name: str, value: Any, kind: type) -> None:
    """Refuses what is of another type; True and False are no numbers, those of NumPy are.

    Args:
        name (str): of the argument.
        value (Any): what was given.
        kind (type): ``numbers.Integral``, ``numbers.Real`` or ``bool``.

    Raises:
        ValueError: the value is none of these.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_EXPECTED[kind]}, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses what is none of the choices.

    Args:
        name (str): of the argument.
        value (Any): what was given.
        choices (Iterable[Any]): what is allowed.

    Raises:
        ValueError: the value is none of these.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_whole(name: str, value: Any, at_least: int) -> None:
    """Refuses what is no whole number, or too small a one.

    Args:
        name (str): of the argument.
        value (Any): what was given.
        at_least (int): the smallest that is allowed.

    Raises:
        ValueError: the value is no whole number, or smaller.
    """
    check_type(name, value, Integral)
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_number(name: str, value: Any, positive: bool = False) -> None:
    """Refuses what is no finite number, or negative.

    Args:
        name (str): of the argument.
        value (Any): what was given.
        positive (bool): refuse 0, too.

    Raises:
        ValueError: the value is none of these.
    """
    check_type(name, value, Real)
    if not 0.0 <= value < math.inf or (positive and not value):
        kind = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be finite and {kind}, got {value}")
