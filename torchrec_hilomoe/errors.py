"""Errors whose message is meant for the person who runs a training, not for a debugger."""

from __future__ import annotations


class HiLoMoEError(Exception):
    """Base of the errors that name what the user can mend."""


class ConfigError(HiLoMoEError, ValueError):
    """A configuration key is unknown, missing, or holds a value it cannot hold."""


class DataError(HiLoMoEError, ValueError):
    """A data file is missing, unreadable, or holds a value that cannot be used."""


class TrainingError(HiLoMoEError, RuntimeError):
    """A training cannot go on."""


class CheckpointError(HiLoMoEError, RuntimeError):
    """A checkpoint cannot be written, or what is there is damaged."""
