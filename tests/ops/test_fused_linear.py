"""The lm_head and the loss in one pass, against plain autograd on whole logits, and the scores
against log_softmax.
"""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.losses import DIVERGENCES, divergence, support_divergence
from opd.ops.fused_linear import (
    LIVE_BUFFERS,
    fused_linear_divergence,
    fused_linear_loss,
    score_hidden,
)
from opd.ops.heads import LogitForm, OutputHead
from opd.topk import gather_logprobs
from tests.support.processes import ROOT

GOLDEN = json.loads((ROOT / "tests" / "support" / "golden" / "losses.json").read_text())
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
    return randn(num_tokens, TEACHER_H, seed=2, dtype=dtype), randn(
        vocab, TEACHER_H, seed=3, dtype=dtype
    )


def chunk_bytes(tokens, vocab=V, itemsize=4):
    """A budget that gives exactly `tokens` tokens a chunk."""
    return tokens * vocab * itemsize * LIVE_BUFFERS


def entropy_of(logprobs_CV):
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


def entropy_loss(logits, rows):
    """A loss that the package does not have, of all log-probabilities of a token."""
    every_id_CV = torch.arange(logits.vocab).expand(len(logits), -1)
    logprobs_CV = logits.logprobs(every_id_CV)
    return entropy_of(logprobs_CV), {
        "entropy": entropy_of(logprobs_CV),
        "largest": logprobs_CV.amax(-1),
    }


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products, those that write into given memory
    included.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def naive_entropy(hidden_NH, weight_VH):
    return entropy_of((hidden_NH @ weight_VH.T).log_softmax(-1)).sum()


# --------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("index", range(len(GOLDEN["divergence"])))
def test_golden_values_through_an_identity_head(index):
    case = GOLDEN["divergence"][index]
    for expected in case["full"]:
        options = {
            name: expected[name] for name in ("kind", "jsd_beta", "skew_alpha") if name in expected
        }
        logits = torch.tensor([case["student_logits"]], dtype=torch.float64, requires_grad=True)
        head = torch.eye(4, dtype=torch.float64, requires_grad=True)
        teacher_logits = torch.tensor([case["teacher_logits"]], dtype=torch.float64)
        loss_sum, stats = fused_linear_divergence(
            logits,
            head,
            teacher_logits,
            torch.eye(4).double(),
            temperature=case["temperature"],
            **options,
        )
        loss_sum.backward()
        golden_grad = torch.tensor([expected["grad"]], dtype=torch.float64)
        assert loss_sum.item() == pytest.approx(expected["loss"], abs=1e-12)
        assert stats["divergence"].tolist() == pytest.approx([expected["loss"]], abs=1e-12)
        torch.testing.assert_close(logits.grad, golden_grad, atol=1e-9, rtol=0)
        torch.testing.assert_close(head.grad, golden_grad.T @ logits.detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("index", range(len(GOLDEN["divergence"])))
def test_golden_supports_through_an_identity_head(index):
    case = GOLDEN["divergence"][index]
    ids_NK = torch.tensor([case["support_ids"]])
    teacher_NK = torch.tensor([case["teacher_logprobs"]], dtype=torch.float64)[
        :, case["support_ids"]
    ]
    for expected in case["support"]:
        options = {
            name: expected[name]
            for name in ("kind", "tail", "jsd_beta", "skew_alpha")
            if name in expected
        }
        logits = torch.tensor([case["student_logits"]], dtype=torch.float64, requires_grad=True)

        def token_loss(chunk, rows, options=options):
            return support_divergence(chunk.logprobs(ids_NK[rows]), teacher_NK[rows], **options), {}

        loss_sum, _ = fused_linear_loss(
            logits, OutputHead(torch.eye(4).double()), token_loss, temperature=case["temperature"]
        )
        loss_sum.backward()
        assert loss_sum.item() == pytest.approx(expected["loss"], abs=1e-12)
        torch.testing.assert_close(
            logits.grad, torch.tensor([expected["grad"]]).double(), atol=1e-7, rtol=0
        )


@pytest.mark.parametrize("tokens", [1, 4, 7, N, 1000])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_loss_and_gradients_are_those_of_whole_logits(kind, tokens, temperature):
    hidden_NH, weight_VH = student()
    teacher_hidden_NH, teacher_weight_VH = teacher()
    weights_N = torch.rand(N, generator=torch.Generator().manual_seed(4))
    options = {"kind": kind, "temperature": temperature, "jsd_beta": 0.3, "skew_alpha": 0.2}
    naive_N = divergence(
        hidden_NH @ weight_VH.T, teacher_hidden_NH @ teacher_weight_VH.T, **options
    )
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
    loss_sum, _ = fused_linear_divergence(
        hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, kind="reverse_kl"
    )
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


# ----------------------------------------------------------------------------------- any token loss


@pytest.mark.parametrize(
    "form", [LogitForm(), LogitForm(scale=0.4), LogitForm(softcap=3.0), LogitForm(2.5, 1.5)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_every_reading_through_every_form_of_head(form, temperature, with_bias):
    """A loss that reads the divergence and log-probabilities, of one token and of several, against
    autograd.
    """
    wide = torch.float64
    hidden_NH, weight_VH = student(wide)
    teacher_hidden_NH, teacher_weight_VH = teacher(wide)
    bias_V = randn(V, seed=5, dtype=wide, requires_grad=True) if with_bias else None
    head = OutputHead(weight_VH, bias_V, form)
    teacher_head = OutputHead(
        teacher_weight_VH, randn(V, seed=6, dtype=wide), LogitForm(softcap=4.0)
    )
    labels_N, ids_NK = torch.arange(N) % V, torch.stack([torch.randperm(V)[:4] for _ in range(N)])
    spoken_M = torch.tensor([0, 2, 3, 7, 8, 10])  # what the teacher speaks about

    def combine(divergence_M, label_logprobs_C, logprobs_MK, index_M):
        support_M = (logprobs_MK.exp() * torch.arange(1, 5)).sum(-1)
        return (0.5 * label_logprobs_C.exp()).index_add(0, index_M, 1.5 * divergence_M + support_M)

    def token_loss(logits, rows):
        here_M = spoken_M[(spoken_M >= rows.start) & (spoken_M < rows.stop)]
        index_M = here_M - rows.start
        seen = logits.divergence(
            teacher_hidden_NH[here_M],
            teacher_head,
            labels_N[here_M],
            index_M,
            kind="jsd",
            jsd_beta=0.3,
            skew_alpha=0.1,
        )
        label_C, support_MK = (
            logits.logprobs(labels_N[rows]),
            logits.logprobs(ids_NK[here_M], index_M),
        )
        return combine(seen.divergence_M, label_C, support_MK, index_M), {}

    z_NV = form(torch.nn.functional.linear(hidden_NH, weight_VH, bias_V))
    logprobs_NV = (z_NV / temperature).log_softmax(-1)
    theirs_NV = teacher_head.form(teacher_hidden_NH @ teacher_weight_VH.T + teacher_head.bias_V)
    naive_M = divergence(
        z_NV[spoken_M], theirs_NV[spoken_M], kind="jsd", jsd_beta=0.3, temperature=temperature
    )
    label_N = logprobs_NV.gather(-1, labels_N[:, None])[:, 0]
    naive = combine(
        naive_M, label_N, logprobs_NV[spoken_M].gather(-1, ids_NK[spoken_M]), spoken_M
    ).sum()
    inputs = [x for x in (hidden_NH, weight_VH, bias_V) if x is not None]
    expected = torch.autograd.grad(naive, inputs)
    loss_sum, stats = fused_linear_loss(
        hidden_NH, head, token_loss, temperature=temperature, chunk_bytes=chunk_bytes(4, itemsize=8)
    )
    torch.testing.assert_close(loss_sum, naive)
    torch.testing.assert_close(list(torch.autograd.grad(loss_sum, inputs)), list(expected))
    assert stats["has_gradient"].all()


def test_the_backward_runs_once():
    """What it would hand out a second time has been scaled in place and given away."""
    loss_sum, _ = fused_linear_loss(student()[0], OutputHead(student()[1]), entropy_loss)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss_sum.backward()


def test_tokens_that_nothing_weighs_have_no_gradient():
    """Masked tokens: exactly zero, not nearly."""
    hidden_NH, weight_VH = student()
    weights_N = torch.ones(N).index_fill(0, torch.tensor([1, 4]), 0.0)
    loss_sum, stats = fused_linear_divergence(
        hidden_NH, weight_VH, *teacher(), kind="jsd", weights_N=weights_N
    )
    loss_sum.backward()
    assert (hidden_NH.grad[[1, 4]] == 0).all() and (hidden_NH.grad[[0, 2, 3]] != 0).any(-1).all()
    assert torch.equal(stats["has_gradient"], weights_N)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    hidden_NH, weight_VH = student()
    loss_sum, stats = fused_linear_divergence(
        hidden_NH,
        weight_VH,
        hidden_NH.detach(),
        weight_VH.detach(),
        kind=kind,
        chunk_bytes=chunk_bytes(4),
    )
    loss_sum.backward()
    assert stats["divergence"].abs().max() < 1e-6
    assert hidden_NH.grad.abs().max() < 1e-6 and weight_VH.grad.abs().max() < 1e-6


def test_a_support_loss_reads_its_own_rows():
    hidden_NH, weight_VH = student()
    ids_NK = torch.stack(
        [torch.randperm(V, generator=torch.Generator().manual_seed(n))[:4] for n in range(N)]
    )
    teacher_NK = gather_logprobs(randn(N, V, seed=6), ids_NK)

    def loss_of(student_CK, rows):
        return support_divergence(student_CK, teacher_NK[rows], kind="reverse_kl", tail="bucket")

    naive = loss_of(gather_logprobs(hidden_NH @ weight_VH.T, ids_NK), slice(0, N)).sum()
    expected = torch.autograd.grad(naive, (hidden_NH, weight_VH))
    loss_sum, stats = fused_linear_loss(
        hidden_NH,
        OutputHead(weight_VH),
        lambda logits, rows: (loss_of(logits.logprobs(ids_NK[rows]), rows), {}),
        chunk_bytes=chunk_bytes(3),
    )
    torch.testing.assert_close(loss_sum, naive)
    torch.testing.assert_close(
        torch.autograd.grad(loss_sum, (hidden_NH, weight_VH)), expected, atol=1e-5, rtol=1e-5
    )
    assert stats.keys() == {"has_gradient"}


def test_logits_are_seen_a_chunk_at_a_time_and_read_in_float32():
    hidden_NH, weight_VH = student(torch.bfloat16)
    seen = []

    def token_loss(logits, rows):
        seen.append((rows, len(logits), logits.vocab))
        loss_C, stats = entropy_loss(logits, rows)
        assert loss_C.dtype == logits.entropy_C.dtype == logits.logsumexp_C.dtype == torch.float32
        return loss_C, stats

    loss_sum, _ = fused_linear_loss(
        hidden_NH, OutputHead(weight_VH), token_loss, chunk_bytes=chunk_bytes(4)
    )
    assert seen == [(slice(a, b), b - a, V) for a, b in [(0, 4), (4, 8), (8, 11)]]
    assert loss_sum.dtype == torch.float32
    loss_sum.backward()
    assert hidden_NH.grad.dtype == weight_VH.grad.dtype == torch.bfloat16


def test_a_budget_below_one_token_still_takes_one():
    hidden_NH, weight_VH = student()
    loss_sum, _ = fused_linear_loss(hidden_NH, OutputHead(weight_VH), entropy_loss, chunk_bytes=1)
    torch.testing.assert_close(loss_sum, naive_entropy(hidden_NH, weight_VH))


def test_bfloat16_gradients_follow_float32_ones():
    """The weight gradient is summed over chunks of one token each: in bfloat16 such a sum would
    drift.
    """
    num_tokens = 600
    hidden_NH, weight_VH = student(torch.bfloat16, num_tokens=num_tokens)
    exact_hidden_NH = hidden_NH.detach().float().requires_grad_(True)
    exact_weight_VH = weight_VH.detach().float().requires_grad_(True)
    fused_linear_loss(exact_hidden_NH, OutputHead(exact_weight_VH), entropy_loss)[0].backward()
    fused_linear_loss(hidden_NH, OutputHead(weight_VH), entropy_loss, chunk_bytes=chunk_bytes(1))[
        0
    ].backward()
    scale = exact_weight_VH.grad.abs().max()
    assert (weight_VH.grad.float() - exact_weight_VH.grad).abs().max() < 0.01 * scale
    assert (
        hidden_NH.grad.float() - exact_hidden_NH.grad
    ).abs().max() < 0.02 * exact_hidden_NH.grad.abs().max()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bfloat16_at_large_logits(kind):
    """Logits of standard deviation 30: products of bfloat16 numbers, but sums and logits in
    float32.
    """
    num_tokens, hidden_size, vocab = 64, 64, 500
    scale = (30 / hidden_size**0.5) ** 0.5
    hidden_NH, weight_VH, theirs_NH, theirs_VH = (
        (randn(rows, hidden_size, seed=i) * scale).to(torch.bfloat16).requires_grad_(i < 2)
        for i, rows in enumerate((num_tokens, vocab, num_tokens, vocab))
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    logits_NV = wide[0] @ wide[1].T
    assert 25 < logits_NV.std() < 35
    naive = divergence(logits_NV, theirs_NH.double() @ theirs_VH.double().T, kind=kind).sum()
    exact = torch.autograd.grad(naive, wide)
    loss_sum, _ = fused_linear_divergence(
        hidden_NH,
        weight_VH,
        theirs_NH,
        theirs_VH,
        kind=kind,
        chunk_bytes=chunk_bytes(9, vocab=vocab),
    )
    found = torch.autograd.grad(loss_sum, (hidden_NH, weight_VH))
    assert loss_sum.item() == pytest.approx(naive.item(), rel=1e-5)
    for gradient, reference in zip(found, exact, strict=True):
        assert gradient.isfinite().all()
        assert (gradient.double() - reference).norm() < 0.01 * reference.norm()


def test_no_tokens_give_a_connected_finite_zero():
    hidden_NH, weight_VH = student(num_tokens=0)
    bias_V = randn(V, seed=5, requires_grad=True)
    loss_sum, stats = fused_linear_loss(hidden_NH, OutputHead(weight_VH, bias_V), entropy_loss)
    assert loss_sum.item() == 0.0 and loss_sum.requires_grad
    assert {name: tuple(stat.shape) for name, stat in stats.items()} == {
        "entropy": (0,),
        "largest": (0,),
        "has_gradient": (0,),
    }
    loss_sum.backward()
    assert hidden_NH.grad.shape == (0, H)
    assert torch.equal(weight_VH.grad, torch.zeros(V, H)) and torch.equal(
        bias_V.grad, torch.zeros(V)
    )
    teacher_hidden_NH, teacher_weight_VH = teacher(num_tokens=0)
    loss_sum, stats = fused_linear_divergence(
        hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, kind="jsd"
    )
    assert loss_sum.item() == 0.0 and loss_sum.requires_grad and stats["divergence"].shape == (0,)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_gradient(frozen):
    """The logits and the gradients of hidden and weight are one product each."""
    hidden_NH, weight_VH = student()
    expected = torch.autograd.grad(naive_entropy(hidden_NH, weight_VH), (hidden_NH, weight_VH))
    (hidden_NH if frozen == "hidden" else weight_VH).requires_grad_(False)
    with Products() as products:
        fused_linear_loss(
            hidden_NH, OutputHead(weight_VH), entropy_loss, chunk_bytes=chunk_bytes(4)
        )[0].backward()
    assert products.count == 2 * N * V * H
    if frozen == "weight":
        assert weight_VH.grad is None
        torch.testing.assert_close(hidden_NH.grad, expected[0], atol=1e-5, rtol=1e-5)
    else:
        assert hidden_NH.grad is None
        torch.testing.assert_close(weight_VH.grad, expected[1], atol=1e-5, rtol=1e-5)


def test_no_more_products_than_the_naive_form():
    hidden_NH, weight_VH = student()
    teacher_hidden_NH, teacher_weight_VH = teacher()
    with Products() as products:
        fused_linear_divergence(
            hidden_NH,
            weight_VH,
            teacher_hidden_NH,
            teacher_weight_VH,
            kind="jsd",
            chunk_bytes=chunk_bytes(4),
        )[0].backward()
    assert products.count == N * V * (3 * H + TEACHER_H)


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden_NH, weight_VH = student()
    differentiable = []

    def token_loss(logits, rows):
        loss_C, stats = entropy_loss(logits, rows)
        differentiable.append(loss_C.requires_grad)
        return loss_C, stats

    with torch.no_grad():
        loss_sum, _ = fused_linear_loss(hidden_NH, OutputHead(weight_VH), token_loss)
    frozen_sum, _ = fused_linear_loss(
        hidden_NH.detach(), OutputHead(weight_VH.detach()), token_loss
    )
    assert (
        differentiable == [False, False]
        and not loss_sum.requires_grad
        and not frozen_sum.requires_grad
    )
    torch.testing.assert_close(loss_sum, frozen_sum)


def test_stats_are_detached_and_arguments_untouched():
    hidden_NH, weight_VH = student()
    copies = hidden_NH.detach().clone(), weight_VH.detach().clone()
    loss_sum, stats = fused_linear_loss(
        hidden_NH, OutputHead(weight_VH), entropy_loss, chunk_bytes=chunk_bytes(4)
    )
    loss_sum.backward()
    assert not any(stat.requires_grad for stat in stats.values()) and stats["largest"].shape == (N,)
    for tensor, copy in zip((hidden_NH, weight_VH), copies, strict=True):
        assert tensor._version == 0 and torch.equal(tensor, copy)


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_hidden_is_log_softmax(dtype, tokens, temperature):
    hidden_NH, weight_VH = (tensor.detach() for tensor in student(dtype))
    bias_V = randn(V, seed=5, dtype=dtype)
    labels_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(7))
    options = {
        "support_k": 5,
        "bias_V": bias_V,
        "temperature": temperature,
        "chunk_bytes": chunk_bytes(tokens),
    }
    scores = score_hidden(hidden_NH, weight_VH, labels_N, **options)
    logits_NV = (
        torch.nn.functional.linear(hidden_NH.double(), weight_VH.double(), bias_V.double())
        / temperature
    )
    logprobs_NV = logits_NV.log_softmax(-1)
    top = logprobs_NV.topk(5)
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(
        scores.sampled_logprobs_N, logprobs_NV.gather(1, labels_N[:, None])[:, 0], **close
    )
    torch.testing.assert_close(scores.logsumexp_N, logits_NV.logsumexp(-1), **close)
    torch.testing.assert_close(
        scores.entropy_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1), **close
    )
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
    assert scores.entropy_N.item() == pytest.approx(
        -(exact_V.exp() * exact_V).sum().item(), abs=5e-5
    )


def test_score_hidden_without_support_and_without_tokens():
    hidden_NH, weight_VH = student(num_tokens=0)
    scores = score_hidden(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.int64))
    assert (
        scores.sampled_logprobs_N.shape == (0,)
        and scores.topk_ids_NK is None
        and scores.topk_logprobs_NK is None
    )
    scores = score_hidden(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.int64), support_k=2)
    assert scores.topk_ids_NK.shape == scores.topk_logprobs_NK.shape == (0, 2)


def test_score_hidden_gives_no_gradient_and_leaves_its_arguments():
    hidden_NH, weight_VH = student()
    copies = hidden_NH.detach().clone(), weight_VH.detach().clone()
    scores = score_hidden(
        hidden_NH, weight_VH, torch.zeros(N, dtype=torch.int64), support_k=3, temperature=2.0
    )
    assert not scores.sampled_logprobs_N.requires_grad
    assert (
        torch.equal(hidden_NH, copies[0])
        and torch.equal(weight_VH, copies[1])
        and hidden_NH._version == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"support_k": V + 1}, "support_k=18"), ({"temperature": 0.0}, "temperature=0.0")],
)
def test_score_hidden_names_a_wrong_value(options, message):
    hidden_NH, weight_VH = student()
    with pytest.raises(ValueError, match=message):
        score_hidden(hidden_NH, weight_VH, torch.zeros(N, dtype=torch.int64), **options)
