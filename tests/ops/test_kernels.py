"""Passes over a tile of logits: against their definitions, against torch's own selection, and
compiled.

C rows, V vocabulary, K ids per row.
"""

import pytest
import torch

from opd.losses import DIVERGENCES, divergence
from opd.ops import kernels


def randn(*shape, seed=0, dtype=torch.float64, scale=3.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    ).to(dtype)


def analytic(x_CV, y_CV, kind):
    lse_C, _ = kernels.statistics(x_CV)
    their_lse_C, _ = kernels.statistics(y_CV)
    return kernels.divergence_and_gradient(
        x_CV,
        lse_C,
        y_CV,
        their_lse_C,
        kind=kind,
        jsd_beta=0.3,
        skew_alpha=0.2,
        gradient_dtype=x_CV.dtype,
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_and_its_gradient_are_those_of_the_definition(kind):
    x_CV, y_CV = randn(5, 33).requires_grad_(), randn(5, 33, seed=1)
    expected_C = divergence(x_CV, y_CV, kind=kind, jsd_beta=0.3, skew_alpha=0.2)
    (expected_CV,) = torch.autograd.grad(expected_C.sum(), x_CV)
    found_C, found_CV = analytic(x_CV.detach(), y_CV, kind)
    torch.testing.assert_close(found_C, expected_C.detach())
    torch.testing.assert_close(found_CV, expected_CV)
    assert x_CV._version == y_CV._version == 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_probabilities_that_underflow_add_nothing(kind):
    """Logits 400 apart: in float32 both probabilities are 0, their logarithms are not."""
    x_CV = torch.tensor([[0.0, -400.0, -200.0], [0.0, -1.0, -2.0]])
    y_CV = torch.tensor([[0.0, -300.0, -400.0], [0.0, -2.0, -1.0]])
    found_C, found_CV = analytic(x_CV, y_CV, kind)
    assert found_C.isfinite().all() and found_CV.isfinite().all()
    assert found_C[0].abs() < 1e-6 and (found_CV[0].abs() < 1e-6).all()
    expected_C, expected_CV = analytic(x_CV.double(), y_CV.double(), kind)
    torch.testing.assert_close(found_C.double(), expected_C, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found_CV.double(), expected_CV, atol=1e-6, rtol=1e-5)


def test_statistics():
    x_CV = randn(4, 50)
    lse_C, entropy_C = kernels.statistics(x_CV)
    torch.testing.assert_close(lse_C, x_CV.logsumexp(-1))
    torch.testing.assert_close(entropy_C, torch.distributions.Categorical(logits=x_CV).entropy())


@pytest.mark.parametrize("k", [0, 1, 7, 64])
@pytest.mark.parametrize("vocab", [64, 1000, 20_000, 64 * 300, 64 * 300 + 1, 64 * 300 + 63])
def test_top_k_is_topk(k, vocab):
    """Vocabularies that blocks divide and do not, and some too small for blocks."""
    x_CV = randn(9, vocab, dtype=torch.float32)
    values_CK, ids_CK = kernels.top_k(x_CV, k)
    expected = x_CV.topk(k)
    assert torch.equal(values_CK, expected.values) and torch.equal(ids_CK, expected.indices)
    # The largest together in one block of any partition, and in the columns that no block holds.
    for ids in (
        torch.arange(k),
        vocab - 1 - torch.arange(k),
        torch.arange(k) * (vocab // 64) % vocab,
    ):
        x_CV = randn(1, vocab, dtype=torch.float32).index_fill(1, ids, 100.0)
        assert set(kernels.top_k(x_CV, k)[1][0].tolist()) == set(x_CV.topk(k).indices[0].tolist())


def test_top_k_among_equals_has_the_right_values():
    x_CV = randn(3, 20_000, dtype=torch.float32).round()
    values_CK, ids_CK = kernels.top_k(x_CV, 50)
    assert torch.equal(values_CK, x_CV.topk(50).values) and torch.equal(
        x_CV.gather(1, ids_CK), values_CK
    )
    assert all(len(set(row.tolist())) == 50 for row in ids_CK)


def test_tiles_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(kernels, "TILE_BYTES", 4 * 10 * 3)  # three rows of ten
    assert list(kernels.tiles(torch.zeros(7, 10))) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(kernels.tiles(torch.zeros(2, 1000))) == [slice(0, 1), slice(1, 2)]
    assert list(kernels.tiles(torch.zeros(0, 10))) == [slice(0, 0)]
    assert list(kernels.tiles(torch.zeros(7, 10, device="meta"))) == [slice(0, 7)]


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_compiled_kernels_are_the_same(kind):
    """What a GPU runs is made by torch's compiler from the same functions; here it makes a CPU
    kernel of them.
    """
    x_CV, y_CV = randn(5, 301, dtype=torch.float32), randn(5, 301, seed=1, dtype=torch.float32)
    (x_lse_C, _), (y_lse_C, _) = kernels.statistics(x_CV), kernels.statistics(y_CV)
    options = {"kind": kind, "jsd_beta": 0.3, "skew_alpha": 0.2}
    compiled = torch.compile(kernels.divergence_and_gradient.__wrapped__, dynamic=True)
    for rows in (5, 3):  # the last chunk is smaller
        mine = (x_CV[:rows], x_lse_C[:rows], y_CV[:rows], y_lse_C[:rows])
        found, expected = (
            compiled(*mine, **options),
            kernels.divergence_and_gradient(*mine, **options),
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
