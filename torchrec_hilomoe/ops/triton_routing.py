"""The score recurrence as one Triton kernel: all layers of a block of samples, softmax included.

Needs ``triton``, which CUDA builds of torch bring along.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

_LEAST_TILE = 16  # of a product in Triton


def fused_recurrence(logits: Tensor, gram: Tensor, num_layers: int) -> Tensor:
    r"""Turns first terms into logits, layer after layer, and gives the scores.

    .. math:: z^{(l)} \mathrel{+}= \sum_{m<l} G^{(l,m)} s^{(m)}, \quad
        s^{(l)} = \mathrm{softmax}(z^{(l)})

    In eager PyTorch each layer is a product, a softmax and a copy, each a launch of its own for a
    few microseconds' work. A product here is K by K by a block of samples, in full float32.

    Args:
        logits (Tensor): first terms, ``[LK, B]``, float32 and contiguous; become the logits.
        gram (Tensor): ``[LK, LK]``, contiguous.
        num_layers (int): L.

    Returns:
        Tensor: scores, ``[LK, B]``.
    """
    scores = torch.empty_like(logits)
    num_experts, batch = logits.size(0) // num_layers, logits.size(1)
    if batch == 0:
        return scores
    tile = max(_LEAST_TILE, triton.next_power_of_2(num_experts))
    block = max(_LEAST_TILE, 2048 // tile)  # samples; a block of scores fits the registers
    grid = (triton.cdiv(batch, block),)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        _recurrence_kernel[grid](logits, scores, gram, batch, num_layers, num_experts, tile, block)
    return scores


@triton.jit
def _recurrence_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    scores_ptr,
    gram_ptr,
    batch,
    num_layers: tl.constexpr,
    num_experts: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    samples = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    experts = tl.arange(0, tile)
    is_expert = experts < num_experts
    mask = is_expert[:, None] & (samples < batch)[None, :]
    gram_mask = is_expert[:, None] & is_expert[None, :]
    for layer in range(num_layers):
        rows = layer * num_experts + experts
        places = rows[:, None] * batch + samples[None, :]
        logits = tl.load(logits_ptr + places, mask=mask, other=0.0)  # [tile, block]
        for earlier in range(layer):
            columns = earlier * num_experts + experts
            gram_places = rows[:, None] * (num_layers * num_experts) + columns[None, :]
            gram = tl.load(gram_ptr + gram_places, mask=gram_mask, other=0.0)  # [tile, tile]
            prior_places = columns[:, None] * batch + samples[None, :]
            prior = tl.load(scores_ptr + prior_places, mask=mask, other=0.0)
            logits += tl.dot(gram, prior, input_precision="ieee")
        logits = tl.where(is_expert[:, None], logits, float("-inf"))
        weights = tl.exp(logits - tl.max(logits, axis=0)[None, :])
        scores = weights / tl.sum(weights, axis=0)[None, :]
        tl.store(logits_ptr + places, logits, mask=mask)
        tl.store(scores_ptr + places, scores, mask=mask)
        tl.debug_barrier()  # the next layer reads what other threads of this block have written
