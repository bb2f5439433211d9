"""Auxiliary losses under DDP on two ranks equal those of one rank with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torchrec_hilomoe.modules import (
    AuxiliaryLoss,
    AuxiliaryLossConfig,
    HiLoMoEConfig,
    HiLoMoELinear,
    HiLoMoEMLP,
    Routing,
    load_balance_loss,
    z_loss,
)

BATCH = 20


class LossOnly(nn.Module):
    """The auxiliary losses alone, of two routers that differ in L, K and top-k."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            HiLoMoELinear(12, 10, HiLoMoEConfig(3, 4, top_k=2)),
            HiLoMoEMLP(10, [8, 6], HiLoMoEConfig(2, 5)),
        )
        config = AuxiliaryLossConfig(1.0, 0.5, 0.25)
        self.auxiliary_loss = AuxiliaryLoss(self.model, config, process_group)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.model(x)
        return self.auxiliary_loss()


def losses_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    losses = model(x)
    losses.total.backward()
    result = dict(losses._asdict())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[name.removeprefix("module.")] = parameter.grad
    return {name: tensor.detach().clone() for name, tensor in result.items()}


def gradients_beside_a_task(model: LossOnly, x: Tensor) -> dict[str, Tensor]:
    (model.model(x).square().mean() + model.auxiliary_loss().total).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def fully_sharded() -> LossOnly:
    model = LossOnly()
    for layer in model.model:
        fully_shard(layer)
    fully_shard(model.model)
    return model


def global_batch() -> Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(1))


def parts_of_batch(first_rows: int) -> tuple[Tensor, ...]:
    return global_batch().split([first_rows, BATCH - first_rows])


def losses_of_unequal_parts(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(20, 400 if rank == 0 else 7, 3, 32, generator=generator)
    routings = [Routing(part.softmax(-1), part) for part in logits]
    return torch.stack([loss(r) for r in routings for loss in (load_balance_loss, z_loss)])


def run_rank(rank: int, folder: Path, first_rows: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    calls: list[int] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    model = DistributedDataParallel(LossOnly(), find_unused_parameters=True)
    rows = parts_of_batch(first_rows)[rank]
    result = losses_and_gradients(model, rows)
    result["all_reduces"] = torch.tensor(len(calls))
    result["of_unequal_parts"] = losses_of_unequal_parts(rank)
    own_groups = [dist.new_group([0]), dist.new_group([1])]
    result["of_own_group"] = torch.stack(LossOnly(own_groups[rank])(rows)).detach()
    equal_parts = global_batch().chunk(2)
    result["of_fsdp"] = gradients_beside_a_task(fully_sharded(), equal_parts[rank])
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort on the way out of an interpreter whose work is done


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("first_rows", [10, 13, 20])
def test_two_ranks_equal_the_global_batch(tmp_path: Path, first_rows: int) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(first_rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    expected = losses_and_gradients(LossOnly(), global_batch())
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert torch.equal(*(result.pop("of_unequal_parts") for result in results))
    for rows, result in zip(parts_of_batch(first_rows), results, strict=True):
        torch.testing.assert_close(
            result.pop("of_own_group"), torch.stack(LossOnly()(rows)).detach()
        )
    beside_a_task = gradients_beside_a_task(LossOnly(), global_batch())
    for actual in results:
        torch.testing.assert_close(actual.pop("of_fsdp"), beside_a_task, rtol=1e-5, atol=1e-6)
        assert actual.pop("all_reduces") == 1
        # Unused parameters get zeros from DDP and no gradient from autograd.
        for name in actual.keys() - expected.keys():
            assert not actual.pop(name).any()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    run_rank(int(sys.argv[3]), Path(sys.argv[1]), int(sys.argv[2]))
