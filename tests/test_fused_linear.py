"""The lm_head and the loss in one pass, against plain autograd on whole logits, and the scores against log_softmax."""

import json
from pathlib import Path

import pytest
import torch

import opd.fused_linear as module
from opd.fused_linear import LIVE_BUFFERS, fused_linear_divergence, fused_linear_loss, score_hidden
from opd.losses import DIVERGENCES, divergence, support_divergence
from opd.topk import gather_logprobs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
N, H, V, TEACHER_H = 11, 6, 17, 9


def randn(*shape, seed, dtype=torch.float32, requires_grad=False):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.to(dtype).requires_grad_(requires_grad)


def student(dtype=torch.float32, num_tokens=N, vocab=V):
    return (
        randn(num_tokens, H, seed=0, dtype=dtype, requires_grad=True),
        randn(vocab, H, seed=1, dtype=dtype, requires_grad=True),
    )


def teacher(dtype=torch.float32, num_tokens=N, vocab=V):
    return randn(num_tokens, TEACHER_H, seed=2, dtype=dtype), randn(vocab, TEACHER_H, seed=3, dtype=dtype)


def chunk_bytes(tokens, vocab=V, itemsize=4):
    """A budget that gives exactly `tokens` tokens a chunk."""
    return tokens * vocab * itemsize * LIVE_BUFFERS


def entropy_loss(logits_CV, rows):
    logprobs_CV = logits_CV.log_softmax(-1)
    entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return entropy_C, {"entropy": entropy_C, "largest": logits_CV.amax(-1)}


# ---------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("index", range(len(GOLDEN["divergence"])))
def test_golden_values_through_an_identity_head(index):
    case = GOLDEN["divergence"][index]
    for expected in case["full"]:
        options = {name: expected[name] for name in ("kind", "jsd_beta", "skew_alpha") if name in expected}
        logits = torch.tensor([case["student_logits"]], dtype=torch.float64, requires_grad=True)
        head = torch.eye(4, dtype=torch.float64, requires_grad=True)
        teacher_logits = torch.tensor([case["teacher_logits"]], dtype=torch.float64)
        loss_sum, stats = fused_linear_divergence(
            logits, head, teacher_logits, torch.eye(4).double(), temperature=case["temperature"], **options
        )
        loss_sum.backward()
        golden_grad = torch.tensor([expected["grad"]], dtype=torch.float64)
        assert loss_sum.item() == pytest.approx(expected["loss"], abs=1e-12)
        assert stats["divergence"].tolist() == pytest.approx([expected["loss"]], abs=1e-12)
        torch.testing.assert_close(logits.grad, golden_grad, atol=1e-9, rtol=0)
        torch.testing.assert_close(head.grad, golden_grad.T @ logits.detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("tokens", [1, 4, 7, N, 1000])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_loss_and_gradients_are_those_of_whole_logits(kind, tokens, temperature):
    hidden_NH, weight_VH = student()
    teacher_hidden_NH, teacher_weight_VH = teacher()
    weights_N = torch.rand(N, generator=torch.Generator().manual_seed(4))
    options = {"kind": kind, "temperature": temperature, "jsd_beta": 0.3, "skew_alpha": 0.2}
    naive_N = divergence(hidden_NH @ weight_VH.T, teacher_hidden_NH @ teacher_weight_VH.T, **options)
    expected = torch.autograd.grad((naive_N * weights_N).sum() * 0.37, (hidden_NH, weight_VH))
    loss_sum, stats = fused_linear_divergence(
        hidden_NH,
        weight_VH,
        teacher_hidden_NH,
        teacher_weight_VH,
        weights_N=weights_N,
        chunk_bytes=chunk_bytes(tokens),
        **options,
    )
    grads = torch.autograd.grad(loss_sum * 0.37, (hidden_NH, weight_VH))
    torch.testing.assert_close(loss_sum, (naive_N * weights_N).sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats["divergence"], naive_N.detach(), atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(V + 3, V), (V, V + 5)])
def test_padded_vocabularies_are_cut_to_the_shared_range(student_vocab, teacher_vocab):
    hidden_NH, weight_VH = student(torch.float64, vocab=student_vocab)
    teacher_hidden_NH, teacher_weight_VH = teacher(torch.float64, vocab=teacher_vocab)
    naive = divergence(
        hidden_NH @ weight_VH[:V].T, teacher_hidden_NH @ teacher_weight_VH[:V].T, kind="reverse_kl"
    ).sum()
    expected = torch.autograd.grad(naive, (hidden_NH, weight_VH))
    loss_sum, _ = fused_linear_divergence(hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, kind="reverse_kl")
    grads = torch.autograd.grad(loss_sum, (hidden_NH, weight_VH))
    torch.testing.assert_close(loss_sum, naive)
    torch.testing.assert_close(grads, expected)
    assert grads[1].shape == weight_VH.shape and (grads[1][V:] == 0).all()


def test_the_teacher_gets_no_gradient():
    hidden_NH, weight_VH = student()
    teacher_NH, teacher_VH = (tensor.requires_grad_(True) for tensor in teacher())
    loss_sum, _ = fused_linear_divergence(hidden_NH, weight_VH, teacher_NH, teacher_VH, kind="jsd")
    loss_sum.backward()
    assert hidden_NH.grad is not None and teacher_NH.grad is None and teacher_VH.grad is None


# ---------------------------------------------------------------------------------------------- any token loss


def test_gradients_by_finite_differences_and_a_second_backward():
    """gradcheck also runs the backward more than once, with other incoming gradients."""
    hidden_NH, weight_VH = student(torch.float64, num_tokens=3, vocab=5)
    bias_V = randn(5, seed=5, dtype=torch.float64, requires_grad=True)

    def loss(hidden_NH, weight_VH, bias_V):
        budget = chunk_bytes(2, vocab=5, itemsize=8)
        return fused_linear_loss(hidden_NH, weight_VH, entropy_loss, bias_V=bias_V, chunk_bytes=budget)[0]

    assert torch.autograd.gradcheck(loss, (hidden_NH, weight_VH, bias_V))


def test_a_support_loss_reads_its_own_rows():
    hidden_NH, weight_VH = student()
    ids_NK = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(n))[:4] for n in range(N)])
    teacher_NK = gather_logprobs(randn(N, V, seed=6), ids_NK)

    def token_loss(logits_CV, rows):
        student_CK = gather_logprobs(logits_CV, ids_NK[rows])
        return support_divergence(student_CK, teacher_NK[rows], kind="reverse_kl", tail="bucket"), {}

    naive = token_loss(hidden_NH @ weight_VH.T, slice(0, N))[0].sum()
    expected = torch.autograd.grad(naive, (hidden_NH, weight_VH))
    loss_sum, stats = fused_linear_loss(hidden_NH, weight_VH, token_loss, chunk_bytes=chunk_bytes(3))
    torch.testing.assert_close(loss_sum, naive)
    torch.testing.assert_close(torch.autograd.grad(loss_sum, (hidden_NH, weight_VH)), expected, atol=1e-5, rtol=1e-5)
    assert stats == {}


def test_logits_are_seen_a_chunk_at_a_time_in_float32():
    hidden_NH, weight_VH = student(torch.bfloat16)
    seen = []

    def token_loss(logits_CV, rows):
        seen.append((rows, tuple(logits_CV.shape), logits_CV.dtype))
        return entropy_loss(logits_CV, rows)

    loss_sum, stats = fused_linear_loss(hidden_NH, weight_VH, token_loss, chunk_bytes=chunk_bytes(4))
    assert seen == [(slice(a, b), (b - a, V), torch.float32) for a, b in [(0, 4), (4, 8), (8, 11)]]
    assert loss_sum.dtype == torch.float32 and stats["entropy"].dtype == torch.float32
    loss_sum.backward()
    assert hidden_NH.grad.dtype == weight_VH.grad.dtype == torch.bfloat16


def test_a_budget_below_one_token_still_takes_one():
    hidden_NH, weight_VH = student()
    loss_sum, _ = fused_linear_loss(hidden_NH, weight_VH, entropy_loss, chunk_bytes=1)
    torch.testing.assert_close(loss_sum, entropy_loss(hidden_NH @ weight_VH.T, slice(0, N))[0].sum())


def test_bfloat16_gradients_follow_float32_ones():
    """The weight gradient is summed over chunks of one token each: in bfloat16 such a sum would drift."""
    num_tokens = 600
    hidden_NH, weight_VH = student(torch.bfloat16, num_tokens=num_tokens)
    exact_hidden_NH = hidden_NH.detach().float().requires_grad_(True)
    exact_weight_VH = weight_VH.detach().float().requires_grad_(True)
    fused_linear_loss(exact_hidden_NH, exact_weight_VH, entropy_loss)[0].backward()
    fused_linear_loss(hidden_NH, weight_VH, entropy_loss, chunk_bytes=chunk_bytes(1))[0].backward()
    scale = exact_weight_VH.grad.abs().max()
    assert (weight_VH.grad.float() - exact_weight_VH.grad).abs().max() < 0.01 * scale
    assert (hidden_NH.grad.float() - exact_hidden_NH.grad).abs().max() < 0.02 * exact_hidden_NH.grad.abs().max()


def test_no_tokens_give_a_connected_finite_zero():
    hidden_NH, weight_VH = student(num_tokens=0)
    bias_V = randn(V, seed=5, requires_grad=True)
    loss_sum, stats = fused_linear_loss(hidden_NH, weight_VH, entropy_loss, bias_V=bias_V)
    assert loss_sum.item() == 0.0 and loss_sum.requires_grad
    assert {name: tuple(stat.shape) for name, stat in stats.items()} == {"entropy": (0,), "largest": (0,)}
    loss_sum.backward()
    assert hidden_NH.grad.shape == (0, H)
    assert torch.equal(weight_VH.grad, torch.zeros(V, H)) and torch.equal(bias_V.grad, torch.zeros(V))
    teacher_hidden_NH, teacher_weight_VH = teacher(num_tokens=0)
    loss_sum, stats = fused_linear_divergence(hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, kind="jsd")
    assert loss_sum.item() == 0.0 and loss_sum.requires_grad and stats["divergence"].shape == (0,)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_gradient(frozen, monkeypatch):
    outer_calls = []
    real_add_outer = module._add_outer
    monkeypatch.setattr(module, "_add_outer", lambda *args: (outer_calls.append(1), real_add_outer(*args)))
    hidden_NH, weight_VH = student()
    expected = torch.autograd.grad(
        entropy_loss(hidden_NH @ weight_VH.T, slice(0, N))[0].sum(), (hidden_NH, weight_VH)
    )
    (hidden_NH if frozen == "hidden" else weight_VH).requires_grad_(False)
    fused_linear_loss(hidden_NH, weight_VH, entropy_loss, chunk_bytes=chunk_bytes(4))[0].backward()
    if frozen == "weight":
        assert weight_VH.grad is None and not outer_calls
        torch.testing.assert_close(hidden_NH.grad, expected[0], atol=1e-5, rtol=1e-5)
    else:
        assert hidden_NH.grad is None and len(outer_calls) == 3
        torch.testing.assert_close(weight_VH.grad, expected[1], atol=1e-5, rtol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden_NH, weight_VH = student()
    grad_enabled = []

    def token_loss(logits_CV, rows):
        grad_enabled.append(torch.is_grad_enabled() or logits_CV.requires_grad)
        return entropy_loss(logits_CV, rows)

    with torch.no_grad():
        loss_sum, _ = fused_linear_loss(hidden_NH, weight_VH, token_loss)
    frozen_sum, _ = fused_linear_loss(hidden_NH.detach(), weight_VH.detach(), token_loss)
    assert grad_enabled == [False, False] and not loss_sum.requires_grad and not frozen_sum.requires_grad
    torch.testing.assert_close(loss_sum, frozen_sum)


def test_stats_are_detached_and_arguments_untouched():
    hidden_NH, weight_VH = student()
    copies = hidden_NH.detach().clone(), weight_VH.detach().clone()
    loss_sum, stats = fused_linear_loss(hidden_NH, weight_VH, entropy_loss, chunk_bytes=chunk_bytes(4))
    loss_sum.backward()
    assert not any(stat.requires_grad for stat in stats.values()) and stats["largest"].shape == (N,)
    for tensor, copy in zip((hidden_NH, weight_VH), copies, strict=True):
        assert tensor._version == 0 and torch.equal(tensor, copy)


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_hidden_is_log_softmax(dtype, tokens, temperature):
    hidden_NH, weight_VH = (tensor.detach() for tensor in student(dtype))
    bias_V = randn(V, seed=5, dtype=dtype)
    labels_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(7))
    options = {"support_k": 5, "bias_V": bias_V, "temperature": temperature, "chunk_bytes": chunk_bytes(tokens)}
    scores = score_hidden(hidden_NH, weight_VH, labels_N, **options)
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V).double() / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    top = logprobs_NV.topk(5)
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(scores.sampled_logprobs_N, logprobs_NV.gather(1, labels_N[:, None])[:, 0], **close)
    torch.testing.assert_close(scores.logsumexp_N, logits_NV.logsumexp(-1), **close)
    torch.testing.assert_close(scores.entropy_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1), **close)
    torch.testing.assert_close(scores.topk_logprobs_NK, top.values, **close)
    torch.testing.assert_close(logprobs_NV.gather(1, scores.topk_ids_NK), top.values, **close)
    assert scores.topk_ids_NK.dtype == torch.int64
    for name in ("sampled_logprobs_N", "logsumexp_N", "entropy_N", "topk_logprobs_NK"):
        assert getattr(scores, name).dtype == torch.float32


def test_score_hidden_keeps_precision_at_large_logits():
    hidden_NH, weight_VH = torch.tensor([[300.0]]), torch.tensor([[1.0], [0.99], [-1.0]])
    scores = score_hidden(hidden_NH, weight_VH, torch.tensor([1]))
    exact_V = (hidden_NH.double() @ weight_VH.double().T).log_softmax(-1)[0]
    assert scores.sampled_logprobs_N.item() == pytest.approx(exact_V[1].item(), abs=5e-5)
    assert scores.entropy_N.item() == pytest.approx(-(exact_V.exp() * exact_V).sum().item(), abs=5e-5)


def test_score_hidden_without_support_and_without_tokens():
    hidden_NH, weight_VH = student(num_tokens=0)
    scores = score_hidden(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.int64))
    assert scores.sampled_logprobs_N.shape == (0,) and scores.topk_ids_NK is None and scores.topk_logprobs_NK is None
    scores = score_hidden(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.int64), support_k=2)
    assert scores.topk_ids_NK.shape == scores.topk_logprobs_NK.shape == (0, 2)


def test_score_hidden_gives_no_gradient_and_leaves_its_arguments():
    hidden_NH, weight_VH = student()
    copies = hidden_NH.detach().clone(), weight_VH.detach().clone()
    scores = score_hidden(hidden_NH, weight_VH, torch.zeros(N, dtype=torch.int64), support_k=3, temperature=2.0)
    assert not scores.sampled_logprobs_N.requires_grad
    assert torch.equal(hidden_NH, copies[0]) and torch.equal(weight_VH, copies[1]) and hidden_NH._version == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"support_k": V + 1}, "support_k=18"), ({"temperature": 0.0}, "temperature=0.0")]
)
def test_score_hidden_names_a_wrong_value(options, message):
    hidden_NH, weight_VH = student()
    with pytest.raises(ValueError, match=message):
        score_hidden(hidden_NH, weight_VH, torch.zeros(N, dtype=torch.int64), **options)
