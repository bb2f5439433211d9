"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


# Those with a checkpoint: tests/inference/test_snippets.py.
@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "OUTPUT_DIR" not in s])
def test_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile
