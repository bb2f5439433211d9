from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.synthetic.train_rows=6000",
    "data.synthetic.valid_rows=2000",
    "data.synthetic.test_rows=2000",
    "data.batch_size=256",
    "model.num_experts=4",
    "training.log_every=1",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides for a run of seconds."""
    return SMALL


@dataclass
class Run:
    """A finished launch."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line on stdout."""
        assert self.code == 0, self.stderr[-4000:]
        return json.loads(self.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Callable[..., Run]:
    """Runs an entry script as a user would: torchrun for several ranks, python for one."""
    cache = tmp_path_factory.mktemp("cache")

    def run(
        *overrides: str,
        ranks: int = 1,
        script: str = "train_dlrm_hilomoe",
        timeout: int = 300,
        cwd: Path = cache,
        **env,
    ) -> Run:
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [*start, str(ROOT / "examples" / f"{script}.py"), *overrides],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHREC_HILOMOE_CACHE": str(cache), **env},
            cwd=cwd,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run
