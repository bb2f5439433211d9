"""The mathematics of HiLoMoE as pure functions of tensors."""

from torchrec_hilomoe.ops.dot_products import (
    concatenate,
    pairwise_dot_products,
    with_dot_products,
)
from torchrec_hilomoe.ops.gather import gathered_experts_linear, gathering_is_cheaper
from torchrec_hilomoe.ops.linear import (
    building_is_cheaper,
    built_weight_linear,
    hilomoe_linear,
    stacked_experts_linear,
)
from torchrec_hilomoe.ops.reference import hilomoe_linear_reference, route_reference
from torchrec_hilomoe.ops.routing import (
    gram_matrix,
    projecting_keys_is_cheaper,
    query_space_is_cheaper,
    route,
    route_projected,
)
from torchrec_hilomoe.ops.self_routed import (
    RouterWeights,
    self_routed_linear,
    self_routing_is_cheaper,
)
from torchrec_hilomoe.ops.tiled import tiled_experts_linear, tiling_is_cheaper

__all__ = [
    "RouterWeights",
    "building_is_cheaper",
    "built_weight_linear",
    "concatenate",
    "gathered_experts_linear",
    "gathering_is_cheaper",
    "gram_matrix",
    "hilomoe_linear",
    "hilomoe_linear_reference",
    "pairwise_dot_products",
    "projecting_keys_is_cheaper",
    "query_space_is_cheaper",
    "route",
    "route_projected",
    "route_reference",
    "self_routed_linear",
    "self_routing_is_cheaper",
    "stacked_experts_linear",
    "tiled_experts_linear",
    "tiling_is_cheaper",
    "with_dot_products",
]
