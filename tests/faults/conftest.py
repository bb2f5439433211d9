from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed import checkpoint as dcp

from torchrec_hilomoe.training.checkpoint.safe_load import SafeReader, read_metadata

HERE = Path(__file__).parent
CONF = HERE.parents[1] / "conf"
SMALL = [
    "data.synthetic.train_rows=1024",
    "data.synthetic.valid_rows=256",
    "data.synthetic.test_rows=64",
    "data.batch_size=64",
    "data.shuffle_buffer=256",
    "model.embedding_dim=8",
    "model.dense_arch_layer_sizes=[8]",
    "model.over_arch_layer_sizes=[8]",
    "model.dropout=0.1",
    "training.evaluations_per_epoch=2",
    "sharding=row_wise",
    "checkpoint.every_batches=5",
    "checkpoint.keep_last=100",
]


class Launcher:
    """Starts ranks as torchrun does, from a server that has imported everything once."""

    def __init__(self, cache: Path) -> None:
        sys.path.insert(0, str(HERE))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torchrec_hilomoe.training", "torch.distributed.optim"]
        )
        self._cache = cache

    def __call__(
        self,
        output_dir: Path,
        *overrides: str,
        ranks: int = 2,
        fault: Any = None,
        timeout: float = 120.0,
    ) -> tuple[list[int | None], str]:
        """Runs a training to its end; returns the exit codes of the ranks and what they wrote.

        Ranks that still run ``timeout`` seconds later are killed; their code is None.
        """
        from worker import train_rank

        output_dir.mkdir(parents=True, exist_ok=True)
        values = self.values(output_dir, *overrides)
        return self._run(train_rank, (values, fault), ranks, output_dir / "log.txt", timeout)

    def score(
        self, checkpoint: Path, predictions: Path, sharding: str, ranks: int
    ) -> tuple[list[int | None], str]:
        """Scores the valid split of the synthetic data; returns as a training does."""
        from worker import score_rank

        values = {
            "checkpoint": str(checkpoint),
            "data": {
                "test": str(next(self._cache.rglob("valid.parquet"))),
                "batch_size": 32 * ranks,
            },
            "predictions": str(predictions),
            "sharding": {"type": sharding},
        }
        return self._run(score_rank, (values,), ranks, predictions.with_suffix(".txt"), 60.0)

    def _run(
        self, target: Any, arguments: tuple[Any, ...], ranks: int, log: Path, timeout: float
    ) -> tuple[list[int | None], str]:
        log.unlink(missing_ok=True)
        port = _free_port()
        processes = [
            self._context.Process(target=target, args=(rank, ranks, port, str(log), *arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        codes: list[int | None] = []
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
        return codes, log.read_text(errors="replace")

    def values(self, output_dir: Path, *overrides: str) -> dict[str, Any]:
        own = [f"output_dir={output_dir}", f"data.cache_dir={self._cache}"]
        if not any(override.startswith("model=") for override in overrides):
            own += ["model.expert_width=10", "model.plain_width=10", "model.num_experts=4"]
        other_data = any(override.startswith("data=") for override in overrides)
        small = [o for o in SMALL if not (other_data and o.startswith("data.synthetic."))]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*small, *own, *overrides])
        values = OmegaConf.to_container(config, resolve=True)
        return {k: v for k, v in values.items() if k not in ("experiment", "logging")}


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def undisturbed(
    launch: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The output folder of a run without faults, by number of ranks; made once."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"undisturbed{ranks}")
            codes, log = launch(folder, ranks=ranks)
            assert codes == [0] * ranks, log
            made[ranks] = folder
        return made[ranks]

    return run


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Metrics and all checkpoints that both have are equal bit for bit, to the last one."""

    def check(actual: Path, expected: Path) -> None:
        assert _metrics(actual) == _metrics(expected)
        ours, theirs = ({p.name: p for p in _checkpoints(run)} for run in (actual, expected))
        assert max(ours)[:13] == max(theirs)
        common = {name: folder for name, folder in ours.items() if name[:13] in theirs}
        assert len(common) > 3
        for name, folder in common.items():
            progress = _progress(folder)
            if not progress["evaluation_due"]:  # else saved by the signal, before the evaluation
                assert progress == _progress(theirs[name[:13]])
                _assert_equal(_tensors(folder), _tensors(theirs[name[:13]]), name)

    return check


@pytest.fixture
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Reads a checkpoint folder."""
    return _tensors


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    weights = checkpoint / "weights"
    saved = read_metadata(weights).state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in saved.items()}
    dcp.load(state, storage_reader=SafeReader(weights), no_dist=True)
    return state


def _assert_equal(actual: dict, expected: dict, name: str) -> None:
    assert actual.keys() == expected.keys(), name
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert not different, f"{name}: {different}"


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _metrics(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {k: v for k, v in metrics.items() if k not in ("output_dir", "train_samples_per_second")}


def _progress(checkpoint: Path) -> dict[str, Any]:
    progress = json.loads((checkpoint / "run.json").read_text())["progress"]
    return {k: v for k, v in progress.items() if k != "seconds"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
