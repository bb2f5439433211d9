from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
