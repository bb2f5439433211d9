"""Checks of what a constructor is given: the errors name argument and value."""

from __future__ import annotations

from numbers import Integral, Real


def check_whole(name: str, value: object, at_least: int | None = None) -> None:
    """Refuses what is no whole number, or too small a one; True is none.

    Args:
        name (str): of the argument.
        value (object): any value.
        at_least (int | None): the smallest that is allowed; None allows all.

    Raises:
        ValueError: it is no whole number, or too small.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if at_least is not None and int(value) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_number(name: str, value: object) -> None:
    """Refuses what is no real number; True is none.

    Args:
        name (str): of the argument.
        value (object): any value.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False.

    Args:
        name (str): of the argument.
        value (object): any value.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
