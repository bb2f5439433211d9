"""What Hydra raises before a task begins, in words that say what was expected and what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from torchrec_hilomoe.config import unknown_key


def explain(error: Exception, conf: Path) -> str:
    """One message for an error of composing the configuration and making the output folder.

    Args:
        error (Exception): as Hydra raised it.
        conf (Path): folder of the configurations.

    Returns:
        str: names the key; for unknown keys those that there are.
    """
    if isinstance(error, OSError) and not str(error.filename).endswith(".yaml"):
        return f"output_dir: cannot be made: {error}"  # the first thing that Hydra does
    if isinstance(error, OverrideParseException):
        key, is_override, value = error.override.partition("=")
        if is_override and not key.startswith("-"):
            reason = str(error).splitlines()[0]
            return (
                f"{key}: cannot read {value} ({reason}). A value with = or brackets, such as the "
                f"path clicks/dt=2024-05-01, takes quotes inside of the shell's: \"{key}='PATH'\", "
                f"or \"{key}=['PATH','PATH']\""
            )
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        path, known = str(cause.full_key), [str(key) for key in cause.parent_node]
        if known and path.rpartition(".")[2] not in known:
            return unknown_key(path, known)
    if "Config group override must be a string" in str(error):
        for override in sys.argv[1:]:
            group, _, value = override.partition("=")
            options = sorted(path.stem for path in (conf / group).glob("[!_]*.yaml"))
            if value == "null" and options:
                none = ", or ~tuned for none" if group == "tuned" else ""
                return f"{group}=null: expected one of {', '.join(options)}{none}"
    if "'${experiment}_${model}'" in str(error):
        return (
            "experiment, model: expected one name each; an experiment of yours may join several by "
            "beginning with `defaults: [ONE, OTHER]`"
        )
    if "Could not override 'tuned'" in str(error):
        return (
            "tuned: an experiment cannot override it; give tuned=NAME on the command line, or "
            "beside the experiment a file tuned/EXPERIMENT_MODEL.yaml with `# @package model` and "
            "`defaults: [NAME]`"
        )
    absent = _group_of_no_choice(str(error))
    if absent and (conf / absent).is_dir():
        return (
            f"{absent}: cannot be chosen here; an evaluation takes data and model as the "
            "checkpoint has them, and files by data.test=FILE"
        )
    return str(error).split("\nTo append to your config")[0]


def _group_of_no_choice(message: str) -> str | None:
    """The group that Hydra knows of, but that the script's configuration does not have."""
    found = re.search(r"Could not override '([^'@]+)'.*No match in the defaults list", message)
    return found and found[1]
