"""The mathematics of HiLoMoE as pure functions of tensors."""

from torchrec_hilomoe.ops.linear import (
    building_is_cheaper,
    built_weight_linear,
    hilomoe_linear,
    stacked_experts_linear,
)
from torchrec_hilomoe.ops.reference import hilomoe_linear_reference, route_reference
from torchrec_hilomoe.ops.routing import route

__all__ = [
    "building_is_cheaper",
    "built_weight_linear",
    "hilomoe_linear",
    "hilomoe_linear_reference",
    "route",
    "route_reference",
    "stacked_experts_linear",
]
