"""``docs/metrics.md`` defines every key that a run and an evaluation print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.training import ScoreConfig, score

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
BY_NAME = ("stages", "experts", "rows", "skipped")  # what stands below is named by the run

pytestmark = pytest.mark.filterwarnings("ignore")


def keys(values: Mapping[str, Any], named: bool = False) -> Iterator[str]:
    for key, value in values.items():
        if not named:
            yield key
        if isinstance(value, Mapping):
            yield from keys(value, named=key in BY_NAME)


def test_every_key_is_defined(run_training, tmp_path):
    metrics = run_training(tmp_path / "run")
    cache = metrics["data_report"]["cache"]
    data = {"test": str(next(Path(cache).rglob("test.parquet"))), "cache_dir": cache}
    evaluation = {"checkpoint": str(tmp_path / "run" / "checkpoints" / "best"), "data": data}
    scored = score(parse_config(ScoreConfig, {**evaluation, "predictions": None, "sharding": {}}))
    printed = {*keys(metrics), *keys(scored)}
    assert {"gauc", "bayes_auc", "dead_share", "skipped"} <= printed
    assert printed - set(re.findall(r"`(\w+)`", PAGE)) == set()
