"""The lm_head and the loss in one pass: hidden states go in, a loss sum or scores come out, logits live one chunk long.

Logits are the largest tensor of a language model: 8,192 tokens on a vocabulary of 151,936 are 5 GB in float32, and a
divergence holds several of that size. Here the tokens are taken a chunk at a time over the whole vocabulary, and since
a loss is a sum over tokens, a chunk's gradient is complete as soon as its logits are: both gradients are computed in
the forward, and nothing of the vocabulary's size waits for the backward but the gradient of the weight itself.

Shape legend: N tokens, C tokens of one chunk, H hidden size, V vocabulary, K support size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.losses import divergence
from opd.topk import upcast

TokenLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]

DEFAULT_CHUNK_BYTES = 256 * 2**20
# How many tensors of the logits' size a token loss is reckoned to hold at once, when chunk_bytes becomes tokens.
LIVE_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class HiddenScores:
    """What one model says about given tokens, in float32 and nats over the full vocabulary; ids are int64."""

    sampled_logprobs_N: Tensor
    logsumexp_N: Tensor
    entropy_N: Tensor
    topk_ids_NK: Tensor | None
    topk_logprobs_NK: Tensor | None


def fused_linear_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    token_loss: TokenLoss,
    *,
    bias_V: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of `token_loss(hidden @ weight.T + bias)`: `(loss_sum [], stats: name -> detached [N])`.

    `token_loss(logits_CV, rows)` gets a chunk's logits (float32; float64 if the inputs are) and the slice of N they
    stand for, and returns `(loss_C, {name: stat_C})`, the same names for every chunk. It may be anything differentiable
    in the logits that treats tokens one by one. Other tensors it closes over get no gradient.

    Gradients go to hidden, weight and bias, each only if it asks for one (a frozen head costs no weight gradient), in
    their own shape and dtype; the weight's is accumulated in float32 or float64. With N == 0, token_loss sees one chunk
    of no rows and the result is a zero connected to all three, so ranks with and without tokens run the same
    collectives. Half precision: use bfloat16; float16 gradients are formed before any loss scale and can underflow.
    """
    assert hidden_NH.ndim == weight_VH.ndim == 2 and hidden_NH.shape[1] == weight_VH.shape[1], (
        f"hidden {hidden_NH.shape}, weight {weight_VH.shape}"
    )
    assert hidden_NH.dtype == weight_VH.dtype, f"hidden {hidden_NH.dtype}, weight {weight_VH.dtype}"
    inputs = (hidden_NH, weight_VH, bias_V)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    loss_sum, stats, gradients = _run_chunks(*inputs, token_loss, wanted, chunk_bytes)
    if any(wanted):
        loss_sum = _PrecomputedGradients.apply(*inputs, loss_sum, *gradients)
    return loss_sum, stats


def fused_linear_divergence(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_weight_VH: Tensor,
    *,
    kind: str,
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of `weights_N * divergence(student, teacher)` (see `losses.divergence`) and its stats.

    The two models may differ in hidden size, dtype and padded vocabulary; both are cut to the shorter vocabulary, and
    the weight gradient of rows beyond it is zero. The teacher and `weights_N` get no gradient.
    stats: `divergence` [N], unweighted, in nats.
    """
    assert len(hidden_NH) == len(teacher_hidden_NH), f"student {hidden_NH.shape}, teacher {teacher_hidden_NH.shape}"
    assert weights_N is None or weights_N.shape == hidden_NH.shape[:1], f"{weights_N.shape} for {hidden_NH.shape}"
    shared_vocab = min(len(weight_VH), len(teacher_weight_VH))

    def token_loss(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher_logits_CV = F.linear(teacher_hidden_NH[rows], teacher_weight_VH[:shared_vocab])
        divergence_C = divergence(
            logits_CV, teacher_logits_CV, kind=kind, jsd_beta=jsd_beta, skew_alpha=skew_alpha, temperature=temperature
        )
        loss_C = divergence_C if weights_N is None else divergence_C * weights_N[rows].detach()
        return loss_C, {"divergence": divergence_C}

    # Unless it must be cut, the parameter itself goes in: the backward of a slice would copy the whole gradient.
    student_weight_VH = weight_VH if len(weight_VH) == shared_vocab else weight_VH[:shared_vocab]
    return fused_linear_loss(hidden_NH, student_weight_VH, token_loss, chunk_bytes=chunk_bytes)


@torch.no_grad()
def score_hidden(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    support_k: int = 0,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HiddenScores:
    """Scores of `labels_N` (int64, in 0..V-1) under softmax((hidden @ weight.T + bias) / temperature); no gradient.

    `logsumexp_N` and `entropy_N` are at that temperature too. `support_k` > 0 adds the top-k, descending. Raises
    ValueError for a support_k outside 0..V or a temperature that is not positive.
    """
    if not 0 <= support_k <= len(weight_VH):
        raise ValueError(f"support_k={support_k}: must be between 0 and the vocabulary size {len(weight_VH)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    assert labels_N.shape == hidden_NH.shape[:1], f"labels {labels_N.shape}, hidden {hidden_NH.shape}"

    columns: list[list[Tensor]] = [[], [], [], [], []]
    for rows in _chunks(hidden_NH, weight_VH, chunk_bytes):
        logits_CV = upcast(F.linear(hidden_NH[rows], weight_VH, bias_V))
        if temperature != 1.0:
            logits_CV /= temperature
        chunk = _score_chunk(logits_CV, labels_N[rows], support_k)
        for column, value in zip(columns, chunk, strict=True):
            column.append(value)
    sampled_N, logsumexp_N, entropy_N, ids_NK, logprobs_NK = (torch.cat(column) for column in columns)
    return HiddenScores(
        sampled_logprobs_N=sampled_N.float(),
        logsumexp_N=logsumexp_N.float(),
        entropy_N=entropy_N.float(),
        topk_ids_NK=ids_NK if support_k else None,
        topk_logprobs_NK=logprobs_NK.float() if support_k else None,
    )


def _score_chunk(logits_CV: Tensor, labels_C: Tensor, support_k: int) -> tuple[Tensor, ...]:
    """(sampled logprob, logsumexp, entropy, top-k ids, top-k logprobs); overwrites its own logits and takes one exp.

    With x = logits - max and Z = sum e^x: logprob = x - log Z, entropy = log Z - sum(x e^x) / Z.
    """
    max_C1 = logits_CV.amax(dim=-1, keepdim=True)
    x_CV = logits_CV.sub_(max_C1)
    exp_CV = x_CV.exp()
    z_C1 = exp_CV.sum(dim=-1, keepdim=True)
    entropy_C = (z_C1.log() - exp_CV.mul_(x_CV).sum(dim=-1, keepdim=True) / z_C1).squeeze(-1)
    top_x_CK, top_ids_CK = x_CV.topk(support_k, dim=-1)
    sampled_C = (x_CV.gather(-1, labels_C.unsqueeze(-1)) - z_C1.log()).squeeze(-1)
    return sampled_C, (max_C1 + z_C1.log()).squeeze(-1), entropy_C, top_ids_CK, top_x_CK - z_C1.log()


class _PrecomputedGradients(torch.autograd.Function):
    """Hands out `loss_sum` with gradients that are known already; the backward only scales them."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, loss_sum, *gradients):
        ctx.save_for_backward(*gradients)
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_sum):
        scaled = [None if gradient is None else gradient * grad_loss_sum for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None


@torch.no_grad()
def _run_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    token_loss: TokenLoss,
    wanted: list[bool],
    chunk_bytes: int,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """(loss_sum, stats, gradients of hidden, weight and bias); a gradient that is not `wanted` is None."""
    accumulate_dtype = upcast(weight_VH.new_empty(0)).dtype
    grad_hidden_NH = torch.zeros_like(hidden_NH) if wanted[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=accumulate_dtype) if wanted[1] else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=accumulate_dtype) if wanted[2] else None
    losses: list[Tensor] = []
    stats: dict[str, list[Tensor]] = {}

    for rows in _chunks(hidden_NH, weight_VH, chunk_bytes):
        hidden_CH = hidden_NH[rows]
        loss_C, chunk_stats, dlogits_CV = _chunk_loss(
            upcast(F.linear(hidden_CH, weight_VH, bias_V)), rows, token_loss, any(wanted)
        )
        losses.append(loss_C)
        assert not stats or stats.keys() == chunk_stats.keys(), f"stats {set(stats)}, then {set(chunk_stats)}"
        for name, stat_C in chunk_stats.items():
            stats.setdefault(name, []).append(stat_C.detach())
        if grad_bias_V is not None:
            grad_bias_V += dlogits_CV.sum(dim=0)
        if grad_hidden_NH is not None or grad_weight_VH is not None:
            dlogits_CV = dlogits_CV.to(weight_VH.dtype)
        if grad_hidden_NH is not None:
            torch.mm(dlogits_CV, weight_VH, out=grad_hidden_NH[rows])
        if grad_weight_VH is not None:
            _add_outer(grad_weight_VH, dlogits_CV, hidden_CH)
        del dlogits_CV  # or it would lie beside the next chunk's logits

    # Cast here, not in the backward: what waits for it is then no larger than the weight.
    gradients = [
        None if gradient is None else gradient.to(weight_VH.dtype)
        for gradient in (grad_hidden_NH, grad_weight_VH, grad_bias_V)
    ]
    # One sum over all tokens, not a sum of chunk sums: the value does not depend on where the chunks end.
    return torch.cat(losses).sum(), {name: torch.cat(parts) for name, parts in stats.items()}, gradients


def _chunk_loss(
    logits_CV: Tensor, rows: slice, token_loss: TokenLoss, want_gradient: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """(loss_C, stats, dlogits_CV or None) of one chunk; on return, dlogits is all that is left of the logits' size."""
    if not want_gradient:
        return *token_loss(logits_CV, rows), None
    with torch.enable_grad():
        logits_CV.requires_grad_(True)
        loss_C, chunk_stats = token_loss(logits_CV, rows)
        (dlogits_CV,) = torch.autograd.grad(loss_C.sum(), logits_CV)
    return loss_C.detach(), {name: stat_C.detach() for name, stat_C in chunk_stats.items()}, dlogits_CV


def _add_outer(total_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += dlogits.T @ hidden, in total's precision (addmm does not mix dtypes)."""
    if total_VH.dtype == hidden_CH.dtype:
        total_VH.addmm_(dlogits_CV.t(), hidden_CH)
    else:
        total_VH += dlogits_CV.t() @ hidden_CH


def _chunks(hidden_NH: Tensor, weight_VH: Tensor, chunk_bytes: int) -> Iterator[slice]:
    """Slices of N, each as many tokens as chunk_bytes affords, at least 1; one empty slice when N is 0."""
    num_tokens = len(hidden_NH)
    bytes_per_token = len(weight_VH) * upcast(weight_VH.new_empty(0)).element_size() * LIVE_BUFFERS
    chunk_tokens = max(1, chunk_bytes // bytes_per_token)
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
