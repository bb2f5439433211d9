"""Scoring a split with the sharded model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from torchrec_hilomoe.analysis import ExpertUsage
from torchrec_hilomoe.training.metrics import Predictions
from torchrec_hilomoe.training.optimizers import fused_modules


def predict(
    model: DistributedModelParallel,
    batches: Iterable[Batch],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    usage: ExpertUsage | None = None,
) -> Predictions:
    """Scores this rank's batches; every rank must hand in equally many.

    Args:
        model (DistributedModelParallel): around a `DLRM_HiLoMoETrain`; no pipeline attached.
            It is left in eval mode, with its optimizers as they were. To train on, enter its stage
            again: ``model.train()`` would thaw frozen batch norms.
        batches (Iterable[Batch]): TorchRec's, or `CTRBatch`, which may have groups. Rows with label
            -1 are padding and are dropped.
        device (torch.device): this rank's device.
        stop (Callable[[], bool]): asked after each batch, whether to leave out the rest; the
            answer must be the same on every rank.
        usage (ExpertUsage | None): counts the routing of each sample.

    Returns:
        Predictions: call ``compute()`` on every rank for the metrics.
    """
    model.eval()
    predictions = Predictions()
    groups: deque[torch.Tensor | None] = deque()

    def noting_groups() -> Iterator[Batch]:
        for batch in batches:
            groups.append(getattr(batch, "group", None))
            yield batch

    counters = [
        count for module in fused_modules(model) for count in (module.iter, module.iter_cpu)
    ]
    before = [count.clone() for count in counters]
    # The optimizer is never called in an evaluation.
    pipeline = EvalPipelineSparseDist(model, model.fused_optimizer, device)
    iterator = noting_groups()
    with torch.no_grad():
        while True:
            try:
                output = pipeline.progress(iterator)
            except StopIteration:
                # TorchRec's loading thread has ended. Its flag hides a method of Thread that is
                # called in processes forked later, such as data workers.
                vars(pipeline._batch_loader).pop("_stop", None)
                break
            if usage is not None:
                usage.add(output.labels >= 0)
            predictions.add(output.logits, output.labels, groups.popleft())
            if stop():
                pipeline.reset()
                break
    pipeline.detach()
    for count, value in zip(counters, before, strict=True):
        count.copy_(value)
    return predictions
