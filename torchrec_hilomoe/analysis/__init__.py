"""What a model costs, and how it uses its experts."""

from torchrec_hilomoe.analysis.experts import ExpertHealth, ExpertUsage
from torchrec_hilomoe.analysis.flops import dense_cost

__all__ = ["ExpertHealth", "ExpertUsage", "dense_cost"]
