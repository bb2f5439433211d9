from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a file of ``benchmarks`` as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = [path.stem for path in BENCHMARKS.glob("*.py")]

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in own:
        sys.modules.pop(name, None)
