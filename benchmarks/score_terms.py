"""What the layers of a trained router read of the scores before them, and what that is worth.

python benchmarks/score_terms.py OUTPUT_DIR/checkpoints/best FILE

The logits of a layer are products of its keys with the sample's query, and with what the scores of
the layers before have added to it. Prints, for each layer of each router, the variance over samples
of the second term over that of the first, and the share of the second that no linear map of the
query could have given; then the AUC as trained, and with the second term held at its mean.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_hilomoe.data import open_encoded
from torchrec_hilomoe.modules import HierarchicalRouter, Routing
from torchrec_hilomoe.training.checkpoint import load_model, read_info
from torchrec_hilomoe.training.config import ShardingConfig
from torchrec_hilomoe.training.distributed import init_process_group
from torchrec_hilomoe.training.evaluation import predict
from torchrec_hilomoe.training.run import build_sharded
from torchrec_hilomoe.training.stages import core_model


class ScoreTerms:
    """Watches one router in evaluation.

    Args:
        router (HierarchicalRouter): without top-k.

    Raises:
        ValueError: the router has a top-k.
    """

    def __init__(self, router: HierarchicalRouter) -> None:
        if router.config.top_k is not None:
            raise ValueError("top_k: what scores add is measured of dense routing alone")
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._mean: Tensor | None = None
        router.register_forward_hook(self._hook)

    def _hook(self, router: Any, inputs: tuple[Tensor, ...], routing: Routing) -> Routing | None:
        x, keys = inputs[0], inputs[1] if router.keys is None else router.keys
        query = router.query(x)
        first = torch.einsum("bd,lkd->blk", query, keys) / math.sqrt(keys.size(2))
        if self._mean is None:
            added = routing.logits - first
            self._batches.append((query, _contrasts(first), _contrasts(added)))
            return None
        logits = first + self._mean
        return Routing(logits.softmax(2), logits)

    def shares(self) -> list[tuple[float, float]]:
        """Of each layer after the first: relative variance, and the part not linear in the query.

        What the scores added is held at its mean from now on.
        """
        if not self._batches:  # its experts are off
            return []
        parts = zip(*self._batches, strict=True)
        query, first, added = (torch.cat(part).double() for part in parts)
        self._mean = added.mean(0).float()
        self._batches.clear()
        first, added = first - first.mean(0), added - added.mean(0)
        query = query - query.mean(0)
        fit = torch.linalg.lstsq(query, added.flatten(1), driver="gelsd").solution
        rest = added - (query @ fit).view_as(added)
        power, left = (term.square().sum((0, 2)) for term in (added, rest))
        relative = power / first.square().sum((0, 2))
        return list(zip(relative.tolist(), (left / power).tolist(), strict=True))[1:]


def _contrasts(logits: Tensor) -> Tensor:
    """Less their mean over the experts, which no softmax sees."""
    return logits - logits.mean(2, keepdim=True)


def score_terms(model: nn.Module) -> dict[str, ScoreTerms]:
    """Watches all routers of a model, by name."""
    return {
        name: ScoreTerms(module)
        for name, module in model.named_modules()
        if isinstance(module, HierarchicalRouter)
    }


def main() -> None:
    """Scores a file twice with a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", help="raw file to score")
    args = parser.parse_args()
    device = init_process_group()
    info = read_info(args.checkpoint)
    data = open_encoded(info.encoder, args.file, batch_size=8192, rank=0, world_size=1)
    model = build_sharded(
        info.model, info.features, ShardingConfig(), tables=None, seed=0, device=device
    )
    load_model(model, args.checkpoint)
    routers = score_terms(core_model(model))
    aucs = [predict(model, data.loader("test"), device).compute()["auc"]]
    for name, terms in routers.items():
        for layer, (relative, unlike) in enumerate(terms.shares(), start=2):
            print(
                f"{name}, layer {layer}: {relative:.1%} of the query's variance, "
                f"{unlike:.0%} of it not linear in the query"
            )
    aucs.append(predict(model, data.loader("test"), device).compute()["auc"])
    print(f"AUC as trained {aucs[0]:.5f}, without what scores add {aucs[1]:.5f}")


if __name__ == "__main__":
    main()
