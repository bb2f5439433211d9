"""Signals while data are encoded: there is nothing to save yet."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_dlrm_hilomoe.py"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_while_data_are_made_ends_at_once(tmp_path, number, code):
    cache = tmp_path / "cache"
    command = [sys.executable, str(SCRIPT), "data.synthetic.train_rows=5000000"]
    command += [f"data.cache_dir={cache}", f"output_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not cache.exists():
            assert process.poll() is None, "ended before it began"
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    whole = [path for path in cache.glob("synthetic/*") if not path.name.startswith(".")]
    assert not whole
