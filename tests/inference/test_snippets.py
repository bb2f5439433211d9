"""The snippets of README and docs that start from a checkpoint run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_snippet_runs(page, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHREC_HILOMOE_CACHE", trained.cache)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (snippet,) = (snippet for snippet in snippets if "OUTPUT_DIR" in snippet)
    output_dir = str(trained.checkpoint.parents[1])
    snippet = snippet.replace("OUTPUT_DIR", output_dir).replace('"FILE"', f'"{trained.file}"')
    names = {"__name__": "snippet"}
    exec(compile(snippet, page, "exec", dont_inherit=True), names)
    program = torch.export.load(tmp_path / "model.pt2").module()
    one = names["encoder"].encode(names["pa"].RecordBatch.from_pylist(names["rows"][:1]))
    assert torch.equal(program(*one).sigmoid(), names["probabilities"][:1])
