"""How a model uses its experts: dead experts, entropy, paths."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch import nn

from torchrec_hilomoe.modules import HierarchicalRouter, Routing

_COMPACT_ROWS = 1 << 20
_NO_PATH = -1  # of padding


class ExpertHealth(NamedTuple):
    """Use of one router's experts.

    Attributes:
        dead_share (list[float]): per layer, share of experts whose mean score is less than a tenth
            of the uniform 1/K [R].
        usage_entropy (list[float]): per layer, entropy of the mean scores over log K: 1 if all
            experts are used alike, 0 if one takes all. 1 for a single expert.
        sample_entropy (list[float]): per layer, mean over samples of the entropy of their scores
            over log K: 1 if a sample uses all experts alike, 0 if one.
        paths (int): distinct paths over all samples; a path is the strongest expert of each layer.
        possible_paths (int): K^L.
    """

    dead_share: list[float]
    usage_entropy: list[float]
    sample_entropy: list[float]
    paths: int
    possible_paths: int


class ExpertUsage:
    """Watches the routers of a model in evaluation, within a ``with`` block.

    Routers that were scripted or traced away are not found; those of a model that was compiled
    are, but their routing is not seen.

    Args:
        model (nn.Module): its routers are found once, here.

    Example:
        >>> from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear
        >>> model = HiLoMoELinear(16, 8, HiLoMoEConfig(num_layers=2, num_experts=4)).eval()
        >>> with ExpertUsage(model) as usage:
        ...     output = model(torch.randn(5, 16))
        ...     usage.add(torch.ones(5, dtype=torch.bool))
        >>> usage.compute()["router"].possible_paths
        16
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = {
            name: _Tally(router)
            for name, router in model.named_modules()
            if isinstance(router, HierarchicalRouter)
        }

    def __enter__(self) -> ExpertUsage:
        for tally in self._routers.values():
            tally.watch()
        return self

    def __exit__(self, *exception: Any) -> None:
        for tally in self._routers.values():
            tally.hook.remove()

    def add(self, keep: torch.Tensor) -> None:
        """Counts the routing of the last forward.

        Args:
            keep (torch.Tensor): [B], bool, the samples to count; others are padding.
        """
        for tally in self._routers.values():
            tally.add(keep)

    def compute(self) -> dict[str, ExpertHealth]:
        """Sums up over all ranks; every rank must call it.

        Returns:
            dict[str, ExpertHealth]: by the router's name in the model. Of a router of several
            tokens a sample, one after another, each is counted. Routers that did not run, since
            all their experts are disabled, whose scores are not finite, or whose rows are no
            multiple of the samples are left out.
        """
        health = {name: tally.compute() for name, tally in self._routers.items()}
        return {name: value for name, value in health.items() if value is not None}


class _Tally:
    """Sums over the samples of one router, on this rank."""

    def __init__(self, router: HierarchicalRouter) -> None:
        self._router = router
        shape = router.config.num_layers, router.config.num_experts
        self._last: torch.Tensor | None = None
        self._count = torch.zeros((), dtype=torch.float64)
        self._scores = torch.zeros(shape, dtype=torch.float64)
        self._entropy = torch.zeros(shape[0], dtype=torch.float64)
        self._paths = torch.zeros((0, shape[0]), dtype=torch.int16)
        self._new: list[torch.Tensor] = []

    def watch(self) -> None:
        self.hook = self._router.register_forward_hook(self._keep_scores)

    def _keep_scores(self, router: nn.Module, inputs: Any, routing: Routing) -> None:
        self._last = routing.scores.detach()

    def add(self, keep: torch.Tensor) -> None:
        if self._last is None:
            return
        scores, self._last = self._last, None
        tokens, rest = divmod(scores.size(0), max(keep.numel(), 1))  # routed one by one
        if rest:
            return
        keep = keep.repeat_interleave(tokens)
        self._move(scores.device)
        counted = torch.where(keep[:, None, None], scores, 0.0)
        self._count += keep.sum()
        self._scores += counted.sum(dim=0, dtype=torch.float64)
        self._entropy += torch.special.entr(counted).sum(dim=(0, 2), dtype=torch.float64)
        paths = scores.argmax(dim=2).to(torch.int16)
        self._new.append(torch.where(keep[:, None], paths, _NO_PATH))
        if sum(paths.size(0) for paths in self._new) > _COMPACT_ROWS:
            self._compact()

    def _move(self, device: torch.device) -> None:
        """Sums stay where the scores are: a copy to the host would wait for the device."""
        self._count, self._scores = self._count.to(device), self._scores.to(device)
        self._entropy = self._entropy.to(device)

    def _compact(self) -> None:
        if self._new:
            paths = torch.cat([self._paths, torch.cat(self._new).cpu()]).unique(dim=0)
            self._paths, self._new = paths[paths[:, 0] != _NO_PATH], []

    def compute(self) -> ExpertHealth | None:
        self._compact()
        self._move(torch.device("cpu"))
        parts = [(self._count, self._scores, self._entropy, self._paths)]
        if dist.is_available() and dist.is_initialized():
            own, parts = parts[0], [parts[0]] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        count, scores, entropy = (torch.stack([p[i] for p in parts]).sum(dim=0) for i in range(3))
        if not count or not scores.isfinite().all():
            return None
        num_layers, num_experts = scores.shape
        mean, unit = scores / count, math.log(num_experts) or 1.0
        if num_experts == 1:
            usage, sample = torch.ones(num_layers), torch.ones(num_layers)
        else:
            usage, sample = torch.special.entr(mean).sum(dim=1) / unit, entropy / count / unit
        dead = (mean < 0.1 / num_experts).double().mean(dim=1)
        return ExpertHealth(
            _rounded(dead),
            _rounded(usage),
            _rounded(sample),
            torch.cat([p[3] for p in parts]).unique(dim=0).size(0),
            num_experts**num_layers,
        )


def _rounded(values: torch.Tensor) -> list[float]:
    """Six digits: sums over other numbers of ranks agree on so many."""
    return [round(value, 6) for value in values.tolist()]
