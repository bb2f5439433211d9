from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from torchrec_hilomoe.modules import HierarchicalRouter, HiLoMoEConfig, HiLoMoELinear


@pytest.fixture
def watched(load):
    """A router in evaluation, its terms, and samples."""
    linear = HiLoMoELinear(16, 8, HiLoMoEConfig(num_layers=3, num_experts=4, query_dim=8)).eval()
    terms = load("score_terms").score_terms(linear)
    assert list(terms) == ["router"]
    return linear.router, terms["router"], torch.randn(500, 16)


def route(router: HierarchicalRouter, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return router(x).logits


def test_shares_are_those_of_the_recurrence(watched) -> None:
    router, terms, x = watched
    logits = torch.cat([route(router, part) for part in x.split(300)])
    with torch.no_grad():
        own = torch.einsum("bd,lkd->blk", router.query(x), router.keys) / router.keys.size(2) ** 0.5
    own -= own.mean(2, keepdim=True)
    added = logits - logits.mean(2, keepdim=True) - own
    expected = added.var(0).sum(1) / own.var(0).sum(1)
    relative, unlike = zip(*terms.shares(), strict=True)
    assert_close(torch.tensor(relative), expected[1:])
    assert all(0.0 < share < 1.0 for share in unlike)


def test_what_even_scores_add_is_linear_in_the_query(watched) -> None:
    router, terms, x = watched
    with torch.no_grad():
        router.query.projection.weight *= 1e-2
        router.query.projection.bias.zero_()
    route(router, x)
    assert max(unlike for _, unlike in terms.shares()) < 1e-3


def test_then_the_scores_are_read_no_more(watched) -> None:
    router, terms, x = watched
    before = route(router, x)
    terms.shares()
    after = route(router, x)
    with torch.no_grad():
        own = torch.einsum("bd,lkd->blk", router.query(x), router.keys) / router.keys.size(2) ** 0.5
    held = after - own
    assert_close(held, held[:1].expand_as(held), atol=1e-5, rtol=0)
    assert_close(after.softmax(2)[:, 0], before.softmax(2)[:, 0])
    assert not torch.allclose(after.softmax(2)[:, 1:], before.softmax(2)[:, 1:], atol=1e-3)


def test_top_k_is_refused(load) -> None:
    config = HiLoMoEConfig(num_layers=3, num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="top_k"):
        load("score_terms").score_terms(HiLoMoELinear(16, 8, config))
