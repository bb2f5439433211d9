"""What a model costs."""

from torchrec_hilomoe.analysis.flops import dense_cost

__all__ = ["dense_cost"]
