"""Run by test_triton_routing.py in processes of their own: Triton looks at its start alone."""

from __future__ import annotations

import sys

import torch

from torchrec_hilomoe.ops import recurrence, route, route_reference

# B, L, K, D_q: whole and part blocks, K that fills a tile of Triton and K that does not
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 4, 8),
    (70, 16, 8, 13),
    (200, 4, 16, 9),
    (33, 2, 20, 50),
    (0, 3, 4, 8),
]


def check(device: str) -> None:
    """Scores, logits and gradients by the kernel equal those of the reference."""
    recurrence.kernel_is_cheaper = lambda first_terms, top_k: True
    for batch, layers, experts, dim in SHAPES:
        torch.manual_seed(batch)
        inputs = [torch.randn(batch, dim), torch.randn(layers, experts, dim)]
        inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
        outcomes = []
        for execution in (route, route_reference):
            scores, logits = execution(*inputs)
            loss = (scores * (1 + logits.detach())).sum() + logits.square().sum()
            outcomes.append((scores, logits, *torch.autograd.grad(loss, inputs)))
        torch.testing.assert_close(*outcomes, rtol=1e-3, atol=1e-3)


def compile_for_gpus() -> None:
    """Down to machine code, which takes no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchrec_hilomoe.ops.triton_routing import _recurrence_kernel

    pointers = ("logits_ptr", "scores_ptr", "gram_ptr")
    for capability in (80, 90):
        for layers, experts, tile, block in ((16, 8, 16, 128), (3, 20, 32, 64)):
            constants = {
                "num_layers": layers, "num_experts": experts, "tile": tile, "block": block,
            }  # fmt: skip
            signature = dict.fromkeys(pointers, "*fp32") | {"batch": "i32"}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=_recurrence_kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert compiled.asm["cubin"]


if __name__ == "__main__":
    compile_for_gpus() if sys.argv[1] == "compile" else check(sys.argv[1])
