"""Raw files that several folders of tests train on."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_clicks() -> Callable[[Path, int, int], Path]:
    """Writes a CSV file of so many rows, drawn by a seed; users like every other item."""
    return _write_clicks


def _write_clicks(path: Path, rows: int, seed: int) -> Path:
    source = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clicked", "price", "user", "item", "tags"])
        for _ in range(rows):
            user, item = source.randrange(20), source.randrange(30)
            clicked = int(source.random() < 0.2 + 0.6 * ((user + item) % 2))
            tags = "|".join(f"t{source.randrange(9)}" for _ in range(source.randrange(4)))
            writer.writerow([clicked, source.choice(["", "1.5", "-3"]), f"u{user}", item, tags])
    return path
