"""A linear layer and all of its experts at once: no loop over layers or experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.ops.gather import gathered_experts_linear, gathering_is_cheaper
from torchrec_hilomoe.ops.tiled import tiled_experts_linear, tiling_is_cheaper


def hilomoe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
    gate_scale: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    r"""Equal to :func:`hilomoe_linear_reference` with scores times ``gate_scale``.

    Takes the cheapest of :func:`gathered_experts_linear`, :func:`built_weight_linear` and
    :func:`stacked_experts_linear`; the last on tiles (:func:`tiled_experts_linear`) where that
    saves memory traffic (:func:`tiling_is_cheaper`). Gathering and tiles can be differentiated
    once.

    Args:
        x (Tensor): ``[B, d]`` or ``[B, N, d]``.
        weight (Tensor): ``[o, d]``.
        bias (Tensor): ``[o]``.
        expert_u (Tensor): ``[L, K, o]``.
        expert_v (Tensor): ``[L, K, d]``.
        scores (Tensor): ``[B, L, K]``, one routing for all tokens of a sample.
        gate_scale (float): factor on every score.
        top_k (int | None): most scores above 0 in a layer of any sample; None is K.

    Returns:
        Tensor: ``[B, o]`` or ``[B, N, o]``, in the dtype of ``F.linear(x, weight, bias)``.

    Example:
        >>> x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
        >>> expert_u, expert_v = torch.zeros(3, 4, 6), torch.randn(3, 4, 8)
        >>> scores = torch.rand(5, 3, 4)
        >>> y = hilomoe_linear(x, weight, bias, expert_u, expert_v, scores)
        >>> torch.equal(y, F.linear(x, weight, bias))  # U = 0: the experts are silent
        True
    """
    if top_k is not None and gathering_is_cheaper(scores.size(2), top_k):
        return gathered_experts_linear(
            x, weight, bias, expert_u, expert_v, scores, gate_scale, top_k
        )
    num_experts, num_tokens = scores.size(1) * scores.size(2), _num_tokens(x)
    # torch.export has no int where N is dynamic, and would hold N to one side of the choice.
    if isinstance(num_tokens, int) and building_is_cheaper(
        num_tokens, x.size(-1), weight.size(0), num_experts
    ):
        return built_weight_linear(x, weight, bias, expert_u, expert_v, scores, gate_scale)
    if torch.jit.is_scripting():
        return stacked_experts_linear(x, weight, bias, expert_u, expert_v, scores, gate_scale)
    else:  # noqa: RET505 - TorchScript compiles what follows a return, but no else of this
        tiled = tiling_is_cheaper(x, weight, scores)
        execution = tiled_experts_linear if tiled else stacked_experts_linear
        return execution(x, weight, bias, expert_u, expert_v, scores, gate_scale)


def building_is_cheaper(
    num_tokens: int, in_features: int, out_features: int, num_experts: int
) -> bool:
    """Whether one weight per sample takes less time than experts on every token.

    Beside the base's ``N d o`` multiply-adds, a sample costs ``N LK (d + o)`` with stacked experts
    and ``LK d o`` with a built weight. Writing and reading that weight was measured to take as
    long as 64 further experts.

    Args:
        num_tokens (int): N, 1 for an input ``[B, d]``.
        in_features (int): d.
        out_features (int): o.
        num_experts (int): LK, of all layers.

    Returns:
        bool: True where :func:`built_weight_linear` is the cheaper one.

    Example:
        >>> [building_is_cheaper(n, 64, 64, num_experts=96) for n in (1, 32, 64, 128)]
        [False, False, True, True]
    """
    building = (num_experts + 64) * in_features * out_features
    return building < num_tokens * num_experts * (in_features + out_features)


def stacked_experts_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
    gate_scale: float = 1.0,
) -> Tensor:
    r"""All experts as two products: :math:`y = W x + b + U^\top ((V x) \circ s)`.

    U is ``[LK, o]`` and V is ``[LK, d]``. Where U is 0 the output equals
    ``F.linear(x, weight, bias)`` bit for bit. Arguments and result as in :func:`hilomoe_linear`.
    """
    tokens = x.flatten(0, -2)  # [BN, d]
    y = F.linear(tokens, weight, bias)
    projected = F.linear(tokens, expert_v.flatten(0, 1))  # [BN, LK]
    gates = scores.flatten(1).unsqueeze(1).to(projected.dtype)  # [B, 1, LK]
    gated = projected.view(x.size(0), _num_tokens(x), gates.size(2)) * gates
    y = torch.addmm(y, gated.flatten(0, 1), expert_u.flatten(0, 1), alpha=gate_scale)
    return y.view(x.shape[:-1] + y.shape[-1:])


def built_weight_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_u: Tensor,
    expert_v: Tensor,
    scores: Tensor,
    gate_scale: float = 1.0,
) -> Tensor:
    r"""One weight per sample, :math:`W_b = W + U^\top \mathrm{diag}(s_b) V`, one batched product.

    Meant for long sequences. Arguments and result as in :func:`hilomoe_linear`.
    """
    gates = (scores.flatten(1).unsqueeze(1) * gate_scale).to(expert_u.dtype)  # [B, 1, LK]
    experts = (expert_u.flatten(0, 1).t() * gates) @ expert_v.flatten(0, 1)  # [B, o, d]
    weights = experts.add_(weight)
    tokens = x.reshape(x.size(0), _num_tokens(x), x.size(-1))  # [B, N, d]
    y = (tokens @ weights.transpose(1, 2)).add_(bias)
    return y.view(x.shape[:-1] + y.shape[-1:])


def _num_tokens(x: Tensor) -> int:
    """N of ``[B, d]`` (1) or ``[B, N, d]``."""
    return 1 if x.dim() == 2 else x.size(1)
