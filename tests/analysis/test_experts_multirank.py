"""Expert health over two ranks is that of all samples, also where a rank has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from torchrec_hilomoe.analysis import ExpertHealth, ExpertUsage
from torchrec_hilomoe.modules import HiLoMoEConfig, HiLoMoELinear

SAMPLES = 50


def health(rows: slice) -> ExpertHealth:
    torch.manual_seed(0)
    model = HiLoMoELinear(16, 8, HiLoMoEConfig(num_layers=2, num_experts=4)).eval()
    x, keep = torch.randn(SAMPLES, 16), torch.zeros(SAMPLES, dtype=torch.bool)
    keep[rows] = True
    with ExpertUsage(model) as usage:
        model(x)
        usage.add(keep)
    return usage.compute()["router"]


def run_rank(rank: int, folder: Path, first_rows: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = (slice(0, first_rows), slice(first_rows, SAMPLES))[rank]
    (folder / f"rank{rank}.json").write_text(json.dumps(health(rows)))
    dist.barrier()
    os._exit(0)  # gloo may abort on the way out of an interpreter whose work is done


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("first_rows", [20, SAMPLES])
def test_two_ranks_count_all_samples(tmp_path: Path, first_rows: int) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(first_rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    expected = list(health(slice(None)))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == expected


if __name__ == "__main__":
    run_rank(int(sys.argv[3]), Path(sys.argv[1]), int(sys.argv[2]))
