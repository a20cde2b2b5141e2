"""The lm_head and the loss in one pass: hidden states go in, a loss sum or scores come out, logits
live one chunk long.

Logits are the largest tensor of a language model: 8,192 tokens on a vocabulary of 151,936 are 5 GB
in float32, and a divergence holds several of that size. Here the tokens are taken a chunk at a time
over the whole vocabulary, and since a loss is a sum over tokens, a chunk's gradient is complete as
soon as its logits are: both gradients are computed in the forward, at the products of the naive
form and no more, and nothing of the vocabulary's size waits for the backward but the gradient of
the weight itself. (A form that throws the logits away and projects again in the backward pays two
to four products for it; see docs/benchmarks.md.)

Shape legend: N tokens, C tokens of one chunk, H hidden size, V vocabulary, K support size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.config import CHUNK_BYTES
from opd.ops import kernels
from opd.ops.heads import LogitForm, OutputHead
from opd.ops.logits import LogitsChunk, project

ChunkLoss = Callable[[LogitsChunk, slice], tuple[Tensor, dict[str, Tensor]]]

# Tensors of a chunk's logits' size that exist at once, with one teacher: the student's logits and
# the teacher's.
LIVE_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class HiddenScores:
    """What one model says about given tokens, in float32 and nats over the full vocabulary; ids are
    int64.
    """

    sampled_logprobs_N: Tensor
    logsumexp_N: Tensor
    entropy_N: Tensor
    topk_ids_NK: Tensor | None
    topk_logprobs_NK: Tensor | None


def fused_linear_loss(
    hidden_NH: Tensor,
    head: OutputHead,
    token_loss: ChunkLoss,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    teachers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of `token_loss`: `(loss_sum [], stats: name -> detached [N])`.

    `token_loss(logits, rows)` gets a chunk of logits to read from, `head(hidden) / temperature`
    over the first `vocab` tokens (all by default), and the slice of N it stands for; it returns
    `(loss_C, {name: stat_C})`, the same names for every chunk. It may be any differentiable
    function of its readings that treats tokens one by one; other tensors it closes over get no
    gradient. One stat is added: `has_gradient`, whether the loss of a token depends on its logits.

    The logits of a chunk, and those of the `teachers` that token_loss takes divergences from for
    one token, fit into `chunk_bytes`. Gradients go to hidden, weight and bias, each only if it asks
    for one (a frozen head costs no weight gradient), in their own shape and dtype; the weight's is
    accumulated in float32 or float64. With N == 0, token_loss sees one chunk of no rows and the
    result is a zero connected to all three, so ranks with and without tokens run the same
    collectives. Half precision: use bfloat16; float16 gradients are formed before any loss scale
    and can underflow. The backward may run once: it hands the gradients over instead of copying
    them.
    """
    weight_VH, bias_V = head.weight_VH, head.bias_V
    assert hidden_NH.ndim == weight_VH.ndim == 2 and hidden_NH.shape[1] == weight_VH.shape[1], (
        f"hidden {hidden_NH.shape}, weight {weight_VH.shape}"
    )
    assert hidden_NH.dtype == weight_VH.dtype, f"hidden {hidden_NH.dtype}, weight {weight_VH.dtype}"
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    inputs = (hidden_NH, weight_VH, bias_V)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    pieces = _ChunkedLoss(hidden_NH, head, vocab or len(weight_VH), temperature, wanted)
    loss_sum, stats = pieces.run(token_loss, chunk_bytes, teachers)
    if any(wanted):
        loss_sum = _PrecomputedGradients.apply(*inputs, loss_sum, pieces.gradients())
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
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of `weights_N * divergence(student, teacher)` (see `losses.divergence`) and
    its stats.

    The two models may differ in hidden size, dtype and padded vocabulary; both are cut to the
    shorter vocabulary, and the weight gradient of rows beyond it is zero. The teacher and
    `weights_N` get no gradient. stats: `divergence` [N], unweighted, in nats.
    """
    assert len(hidden_NH) == len(teacher_hidden_NH), (
        f"student {hidden_NH.shape}, teacher {teacher_hidden_NH.shape}"
    )
    assert weights_N is None or weights_N.shape == hidden_NH.shape[:1], (
        f"{weights_N.shape} for {hidden_NH.shape}"
    )
    shared_vocab = min(len(weight_VH), len(teacher_weight_VH))
    teacher = OutputHead(teacher_weight_VH[:shared_vocab])

    def token_loss(logits: LogitsChunk, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        states_CH = teacher_hidden_NH[rows].to(teacher_weight_VH.dtype)
        labels_C = torch.zeros(len(logits), dtype=torch.long, device=hidden_NH.device)
        seen = logits.divergence(
            states_CH, teacher, labels_C, kind=kind, jsd_beta=jsd_beta, skew_alpha=skew_alpha
        )
        loss_C = (
            seen.divergence_M if weights_N is None else seen.divergence_M * weights_N[rows].detach()
        )
        return loss_C, {"divergence": seen.divergence_M}

    return fused_linear_loss(
        hidden_NH,
        OutputHead(weight_VH),
        token_loss,
        temperature=temperature,
        vocab=shared_vocab,
        chunk_bytes=chunk_bytes,
    )


@torch.no_grad()
def score_hidden(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    support_k: int = 0,
    bias_V: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 - frozen
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> HiddenScores:
    """Scores of `labels_N` (int64, in 0..V-1) under the head's softmax at `temperature`; no
    gradient.

    Hidden states may lie on the host, in another dtype: a chunk of them visits the head's device.
    `logsumexp_N` and `entropy_N` are at that temperature too. `support_k` > 0 adds the top-k,
    descending. All of it is read from a tile of the logits while it is in cache. Raises ValueError
    for a support_k outside 0..V or a temperature that is not positive.
    """
    if not 0 <= support_k <= len(weight_VH):
        raise ValueError(
            f"support_k={support_k}: must be between 0 and the vocabulary size {len(weight_VH)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    assert labels_N.shape == hidden_NH.shape[:1], (
        f"labels {labels_N.shape}, hidden {hidden_NH.shape}"
    )

    head = OutputHead(weight_VH, bias_V, form)
    tiles: list[tuple[Tensor, ...]] = []
    room_CV = None
    for chunk in _chunks(len(hidden_NH), weight_VH, chunk_bytes, buffers=1):
        size = chunk.stop - chunk.start
        room_CV = _buffer(weight_VH, size) if room_CV is None else room_CV
        hidden_CH = hidden_NH[chunk].to(weight_VH.device, weight_VH.dtype, non_blocking=True)
        out_CV = None if room_CV is None else room_CV[:size]
        logits_CV, labels_C = project(hidden_CH, head, temperature, out=out_CV), labels_N[chunk]
        tiles += [
            _read_tile(logits_CV[rows], labels_C[rows], support_k)
            for rows in kernels.tiles(logits_CV)
        ]
    sampled_N, logsumexp_N, entropy_N, logprobs_NK, ids_NK = map(
        torch.cat, zip(*tiles, strict=True)
    )
    return HiddenScores(
        sampled_logprobs_N=sampled_N.float(),
        logsumexp_N=logsumexp_N.float(),
        entropy_N=entropy_N.float(),
        topk_ids_NK=ids_NK if support_k else None,
        topk_logprobs_NK=logprobs_NK.float() if support_k else None,
    )


def _read_tile(logits_TV: Tensor, labels_T: Tensor, support_k: int) -> tuple[Tensor, ...]:
    """(label's log-probability, logsumexp, entropy, top-k log-probabilities, their ids)."""
    logsumexp_T, entropy_T = kernels.statistics(logits_TV)
    top_TK, ids_TK = kernels.top_k(logits_TV, support_k)
    sampled_T = logits_TV.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1)
    topk_TK = top_TK - logsumexp_T.unsqueeze(-1)
    return sampled_T - logsumexp_T, logsumexp_T, entropy_T, topk_TK, ids_TK


class _PrecomputedGradients(torch.autograd.Function):
    """Hands out `loss_sum` with gradients that are known already; the backward scales them in place
    and gives them away.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, loss_sum, gradients):
        # not saved tensors: what autograd may keep as `.grad` need not be copied into it
        ctx.gradients = gradients
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_sum):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the backward of a fused loss runs once: its gradients have been handed over"
            )
        return (
            *(None if gradient is None else gradient.mul_(grad_loss_sum) for gradient in gradients),
            None,
            None,
        )


class _ChunkedLoss:
    """One pass over the chunks: losses and stats per token, gradients of hidden, weight and bias
    where wanted.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        head: OutputHead,
        vocab: int,
        temperature: float,
        wanted: list[bool],
    ):
        self.hidden_NH, self.temperature, self.wanted = hidden_NH.detach(), temperature, wanted
        weight_VH, bias_V = (
            head.weight_VH.detach(),
            None if head.bias_V is None else head.bias_V.detach(),
        )
        self.head = OutputHead(
            weight_VH[:vocab], None if bias_V is None else bias_V[:vocab], head.form
        )
        wide = _wide(weight_VH)
        # Rows beyond `vocab` exist in the gradients, and stay zero.
        self.grad_hidden_NH = torch.zeros_like(self.hidden_NH) if wanted[0] else None
        self.grad_weight_VH = torch.empty_like(weight_VH, dtype=wide) if wanted[1] else None
        if wanted[1]:
            self.grad_weight_VH[vocab:] = 0
        self.grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if wanted[2] else None

    @torch.no_grad()
    def run(
        self, token_loss: ChunkLoss, chunk_bytes: int, teachers: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses: list[Tensor] = []
        stats: dict[str, list[Tensor]] = {}
        weight_VH, buffers, room = self.head.weight_VH, LIVE_BUFFERS - 1 + teachers, None
        for rows in _chunks(len(self.hidden_NH), weight_VH, chunk_bytes, buffers):
            size = rows.stop - rows.start
            room = _buffer(weight_VH, buffers, size) if room is None else room
            mine_CV, theirs_RV = (
                (None, None) if room is None else (room[0, :size], room[1:].flatten(0, 1))
            )
            logits_CV = project(self.hidden_NH[rows], self.head, self.temperature, out=mine_CV)
            loss_C, chunk_stats = self._chunk(logits_CV, theirs_RV, rows, token_loss)
            losses.append(loss_C)
            assert not stats or stats.keys() == chunk_stats.keys(), (
                f"stats {set(stats)}, then {set(chunk_stats)}"
            )
            for name, stat_C in chunk_stats.items():
                stats.setdefault(name, []).append(stat_C.detach())
        # One sum over all tokens, not a sum of chunk sums: the value does not depend on where the
        # chunks end.
        return torch.cat(losses).sum(), {name: torch.cat(parts) for name, parts in stats.items()}

    def _chunk(
        self, logits_CV: Tensor, room_RV: Tensor | None, rows: slice, token_loss: ChunkLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = LogitsChunk(
            logits_CV,
            form=self.head.form,
            temperature=self.temperature,
            want_gradient=any(self.wanted),
            gradient_dtype=self.head.weight_VH.dtype,
            room_RV=room_RV,
        )
        if not any(self.wanted):
            loss_C, stats = token_loss(logits, rows)
            return loss_C, {**stats, "has_gradient": torch.zeros_like(loss_C)}
        with torch.enable_grad():
            loss_C, stats = token_loss(logits, rows)
        gradient = logits.gradient(loss_C)
        self._accumulate(gradient.dlogits_CV, gradient.scale_C1, rows)
        return loss_C.detach(), {**stats, "has_gradient": gradient.active_C.float()}

    def _accumulate(self, dlogits_CV: Tensor, scale_C1: Tensor, rows: slice) -> None:
        weight_VH, hidden_CH = self.head.weight_VH, self.hidden_NH[rows]
        first = rows.start == 0  # nothing is there yet: what lies in the memory is not read
        if self.grad_bias_V is not None:
            self.grad_bias_V[: len(weight_VH)] += (
                dlogits_CV.t().to(scale_C1.dtype) @ scale_C1
            ).squeeze(-1)
        dlogits_CV = dlogits_CV.to(weight_VH.dtype)
        if self.grad_hidden_NH is not None:
            self.grad_hidden_NH[rows] = torch.mm(dlogits_CV, weight_VH) * scale_C1
        if self.grad_weight_VH is None:
            return
        total_VH, hidden_CH = (
            self.grad_weight_VH[: len(weight_VH)],
            (hidden_CH * scale_C1).to(weight_VH.dtype),
        )
        if total_VH.dtype == hidden_CH.dtype:
            total_VH.addmm_(dlogits_CV.t(), hidden_CH, beta=0 if first else 1)
        elif total_VH.is_cuda:  # not run on a GPU yet; a CPU has no product of mixed dtypes
            torch.addmm(
                *(total_VH, dlogits_CV.t(), hidden_CH),
                beta=0 if first else 1,
                out_dtype=total_VH.dtype,
                out=total_VH,
            )
        elif first:
            total_VH.copy_(dlogits_CV.t() @ hidden_CH)
        else:
            total_VH += dlogits_CV.t() @ hidden_CH

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight and bias, in the model's dtype: what waits for the backward is no
        larger than the weight.
        """
        found = (self.grad_hidden_NH, self.grad_weight_VH, self.grad_bias_V)
        self.grad_hidden_NH = self.grad_weight_VH = self.grad_bias_V = None
        return [
            None if gradient is None else gradient.to(self.head.weight_VH.dtype)
            for gradient in found
        ]


def _wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _buffer(weight_VH: Tensor, *shape: int) -> Tensor | None:
    """Memory for logits, [*shape, V] in float32 or float64, asked for once: fresh memory costs a
    page fault every 4 KiB.

    None on a GPU, where torch keeps what was freed.
    """
    if weight_VH.is_cuda:
        return None
    return weight_VH.new_empty(*shape, len(weight_VH), dtype=_wide(weight_VH))


def _chunks(num_tokens: int, weight_VH: Tensor, chunk_bytes: int, buffers: int) -> Iterator[slice]:
    """Slices of N, each as many tokens as chunk_bytes affords, at least 1; one empty slice when N
    is 0.
    """
    bytes_per_token = len(weight_VH) * _wide(weight_VH).itemsize * buffers
    pieces = -(-num_tokens // max(1, chunk_bytes // bytes_per_token))
    # of equal size: a small rest multiplies slowly
    chunk_tokens = max(1, -(-num_tokens // max(1, pieces)))
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
