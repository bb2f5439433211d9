"""What has to be the same on every rank of a launch; else it would be wrong in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import distributed as dist

from torchrec_hilomoe.config import flat_keys
from torchrec_hilomoe.errors import ConfigError

_SHOWN = 3


def check_alike(values: Mapping[str, Any]) -> None:
    """Refuses values that differ between ranks, such as those of hosts with other files.

    Every rank must call it.

    Args:
        values (Mapping[str, Any]): by key, nested or not; such as a configuration.

    Raises:
        ConfigError: names the keys, and the values of rank 0 and of the first rank that has others;
            raised on every rank.

    Example:
        >>> from torchrec_hilomoe.training.distributed import init_process_group
        >>> device = init_process_group()  # of one rank
        >>> check_alike({"seed": 1, "model": {"scale": float("nan")}})
        >>> dist.destroy_process_group()
    """
    own = {key: repr(value) for key, value in flat_keys(values)}  # as text NaN equals itself
    of_ranks: list[dict[str, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            shown = ", ".join(
                f"{key} ({first.get(key)} on rank 0, {other.get(key)} on rank {rank})"
                for key in keys[:_SHOWN]
            )
            more = f" and {len(keys) - _SHOWN} more keys" if len(keys) > _SHOWN else ""
            raise ConfigError(
                f"{shown}{more}: must be the same on every rank; start all hosts with the same "
                "configuration and the same files"
            )
