"""Log-probabilities on a support: top-k, gather, tail mass, overlap, union.

Runs on CPU in seconds.
"""

import math

import pytest
import torch

from opd.topk import gather_logprobs, log_tail, overlap, topk_logprobs, union_support, upcast


@pytest.fixture
def logits_NV():
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def test_topk_logprobs_are_over_the_full_vocabulary(logits_NV):
    ids_NK, logprobs_NK, logsumexp_N = topk_logprobs(logits_NV, 4)
    expected_NV = logits_NV.log_softmax(-1)
    torch.testing.assert_close(logprobs_NK, expected_NV.sort(descending=True).values[:, :4])
    torch.testing.assert_close(logprobs_NK, expected_NV.gather(1, ids_NK))
    torch.testing.assert_close(logsumexp_N, logits_NV.logsumexp(-1))
    assert ids_NK.dtype == torch.int64 and logprobs_NK.dtype == torch.float64
    assert (logprobs_NK.exp().sum(-1) < 1).all()


@pytest.mark.parametrize("k", [0, 12])
def test_topk_refuses_a_k_outside_the_vocabulary(logits_NV, k):
    with pytest.raises(ValueError, match=f"support_k={k}.*vocabulary size 11"):
        topk_logprobs(logits_NV, k)


def test_gather_logprobs_takes_one_id_or_many_and_is_differentiable(logits_NV):
    ids_NK = torch.randint(0, 11, (7, 3), generator=torch.Generator().manual_seed(1))
    logits_NV.requires_grad_(True)
    many_NK, one_N = gather_logprobs(logits_NV, ids_NK), gather_logprobs(logits_NV, ids_NK[:, 0])
    expected_NK = logits_NV.log_softmax(-1).gather(1, ids_NK)
    torch.testing.assert_close(many_NK, expected_NK)
    torch.testing.assert_close(one_N, expected_NK[:, 0])
    upstream_NK = torch.randn(7, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((many_NK * upstream_NK).sum(), logits_NV)
    (expected_grad,) = torch.autograd.grad((expected_NK * upstream_NK).sum(), logits_NV)
    torch.testing.assert_close(grad, expected_grad)


def test_half_precision_is_computed_in_float32(logits_NV):
    half_NV = logits_NV.bfloat16()
    _, logprobs_NK, _ = topk_logprobs(half_NV, 2)
    torch.testing.assert_close(logprobs_NK, half_NV.float().log_softmax(-1).topk(2).values)
    assert upcast(half_NV).dtype == torch.float32
    assert upcast(logits_NV) is logits_NV


def test_log_tail_is_the_exact_rest():
    logprobs_NK = torch.tensor(
        [[0.5, 0.25], [0.01, 0.01], [0.6, 0.4 - 1e-9]], dtype=torch.float64
    ).log()
    expected_N = torch.tensor([math.log(0.25), math.log(0.98), math.log(1e-9)], dtype=torch.float64)
    torch.testing.assert_close(log_tail(logprobs_NK), expected_N, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_tail_of_mass_one_or_more_is_finite_both_ways(dtype):
    logprobs_NK = torch.tensor(
        [[0.0, -200.0], [math.log(0.5), math.log(0.5)], [1e-3, -50.0]], dtype=dtype
    )
    logprobs_NK.requires_grad_(True)
    tail_N = log_tail(logprobs_NK)
    (grad_NK,) = torch.autograd.grad(tail_N.sum(), logprobs_NK)
    assert tail_N.isfinite().all() and (tail_N < -5).all()
    assert grad_NK.isfinite().all()


def test_log_tail_gradient(logits_NV):
    def from_logits(logits_NV):
        return log_tail(logits_NV.log_softmax(-1)[:, :4])

    assert torch.autograd.gradcheck(from_logits, logits_NV.requires_grad_(True))


def test_overlap_counts_ids_in_both_whatever_their_order():
    ids_NK = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    other_ids_NJ = torch.tensor([[3, 1, 9, 8], [7, 8, 9, 6], [3, 2, 1, 0]])
    assert overlap(ids_NK, other_ids_NJ).tolist() == [2, 0, 3]


def test_union_support_marks_an_id_that_both_have_once():
    ids_NM, is_duplicate_NM = union_support(
        torch.tensor([[1, 2], [4, 3]]), torch.tensor([[2, 5], [6, 7]])
    )
    assert ids_NM.tolist() == [[1, 2, 2, 5], [4, 3, 6, 7]]
    assert is_duplicate_NM.tolist() == [[False, False, True, False], [False] * 4]
