"""Files larger than memory: encoding and loading hold no more of a large file than of a small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_MEBIBYTE = 1 << 20

PROGRAM = """
import sys, threading, time
from torchrec_hilomoe.config import parse_config
from torchrec_hilomoe.data import DataConfig, open_data

def private_mebibytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, private_mebibytes())
        time.sleep(0.005)

config = parse_config(DataConfig, {
    "train": sys.argv[1],
    "cache_dir": sys.argv[2],
    "shuffle_buffer": 100_000,
    "schema": {"dense": ["number"], "categorical": ["user", "item"], "multi_valued": ["tags"]},
})
before = peak = private_mebibytes()
threading.Thread(target=watch, daemon=True).start()
rows = 0
for batch in open_data(config, rank=0, world_size=1, seed=0).loader("train"):
    rows += len(batch.labels)
print(rows, peak - before)
"""


def write_csv(path: Path, copies: int) -> int:
    """Writes ``copies`` times the same 100,000 rows; returns the number of rows."""
    tags = "fantasy|adventure|historical-novel|young-adult"
    block = "".join(
        f"{i % 2},{i * 0.37:.5f},user-{i % 5000},item-{i % 700},{tags}\n" for i in range(100_000)
    )
    with path.open("w") as file:
        file.write("label,number,user,item,tags\n")
        for _ in range(copies):
            file.write(block)
    return copies * 100_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = {}
    for copies in (5, 60):
        path = tmp_path / f"{copies}.csv"
        rows = write_csv(path, copies)
        command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        seen, peak = done.stdout.split()
        assert int(seen) == rows
        peaks[copies] = float(peak)
    size = path.stat().st_size / _MEBIBYTE
    assert size > 400
    assert peaks[60] < peaks[5] + size / 3
