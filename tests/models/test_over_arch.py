"""The MLP behind the interaction."""

from __future__ import annotations

import pytest

from torchrec_hilomoe.models import OverArch


@pytest.mark.parametrize("layer_sizes", [[1], [5, 1]])
def test_a_dropout_that_is_no_probability_is_refused(layer_sizes):
    """By a single linear layer too, which drops nothing."""
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\], got 2.0"):
        OverArch(10, layer_sizes, dropout=2.0)
