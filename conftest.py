"""Every test and doctest has PyTorch's seed; doctests of absent packages are left out."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore = [] if find_spec("triton") else ["torchrec_hilomoe/ops/triton_routing.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # One draw of thousands rounds beyond a tolerance: a failure is to come every time or never.
    torch.manual_seed(0)
