from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchrec_hilomoe.ops import routing

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(task: str, **env: str) -> None:
    worker = Path(__file__).with_name("triton_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), task],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@needs_triton
@pytest.mark.slow
def test_equals_reference_in_the_interpreter() -> None:
    run("cpu", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_compiles_without_a_gpu() -> None:
    run("compile")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_equals_reference_on_a_gpu() -> None:
    run("cuda")


def test_stays_off_where_it_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not routing.kernel_is_cheaper(torch.zeros(12, 5), None)

    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not routing.kernel_is_cheaper(OnGpu(), None)
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr(routing, "_KERNEL_IS_FASTER_ON", frozenset({(9, 0)}))
        assert routing.kernel_is_cheaper(OnGpu(), None)
        assert not routing.kernel_is_cheaper(OnGpu(), 2)
