from __future__ import annotations

from torchrec_hilomoe.models import SparseArch


def test_frozen_lookup_has_no_gradient(collection, make_features):
    arch = SparseArch(collection)
    thawed = arch(make_features())
    arch.frozen = True
    frozen = arch(make_features())
    assert thawed.requires_grad
    assert not frozen.requires_grad
    assert thawed.equal(frozen)
