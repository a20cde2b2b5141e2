"""The passes over a vocabulary that a loss is made of: statistics, divergence with its gradient,
top-k.

Each takes a tile: some rows of logits, float32 or float64, over the whole vocabulary. `tiles` cuts
them so small on a CPU that a tile stays in a core's cache from its first pass to its last; what
these passes cost is memory traffic. On a GPU a tile is everything at hand and `fused` compiles the
passes into few kernels. `losses.divergence` is the definition; the tests hold these to its values
and to its gradients.

Shape legend: C rows (tokens), V vocabulary, K ids per row.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# a core's second-level cache holds the handful of tensors that a kernel makes of a tile
TILE_BYTES = 1 << 20
TOPK_BLOCK = 64


def tiles(logits_CV: Tensor) -> Iterator[slice]:
    """Slices of the rows; one slice, perhaps empty, where cutting does not pay."""
    rows, vocab = logits_CV.shape
    step = max(1, rows)
    if logits_CV.device.type == "cpu":
        step = max(1, TILE_BYTES // (4 * vocab))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def fused(kernel: Callable) -> Callable:
    """`kernel`, compiled where it runs on a GPU.

    Its options (which divergence, which weights) become constants.
    """
    # torch's compiler takes seconds to import
    compiled = functools.cache(lambda: torch.compile(kernel, dynamic=True))

    @functools.wraps(kernel)
    def run(first_CV: Tensor, *arguments, **options):
        return (compiled() if first_CV.is_cuda else kernel)(first_CV, *arguments, **options)

    return run


@fused
def statistics(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp [C], entropy [C] in nats).

    With x = logits - max and Z = sum e^x: log Z - sum(x e^x) / Z.
    """
    max_C1 = logits_CV.amax(dim=-1, keepdim=True)
    x_CV = logits_CV - max_C1
    exp_CV = x_CV.exp()
    z_C = exp_CV.sum(dim=-1)
    return max_C1.squeeze(-1) + z_C.log(), z_C.log() - _dot(exp_CV, x_CV) / z_C


@fused
def divergence_and_gradient(
    logits_CV: Tensor,
    logsumexp_C: Tensor,
    teacher_logits_CV: Tensor,
    teacher_logsumexp_C: Tensor,
    *,
    kind: str,
    jsd_beta: float,
    skew_alpha: float,
    gradient_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(D [C], dD/dlogits [C, V] in `gradient_dtype`) of the divergences of `losses.divergence`.

    Each of them is a sum over the vocabulary whose derivative with respect to p, at fixed q, is u
    up to a constant; through the softmax it becomes p (u - sum p u). Where s and t occur as a
    difference only, the logits serve for them. Raises ValueError for a kind that is not here:
    `losses.divergence` is the definition, but this is what trains.
    """
    s_CV = logits_CV - logsumexp_C.unsqueeze(-1)
    p_CV = s_CV.exp()
    if kind == "reverse_kl":  # D = sum p u, u = s - t
        u_CV = torch.sub(logits_CV, teacher_logits_CV)
        mean_C = _dot(p_CV, u_CV)
        gradient_CV = p_CV * u_CV.sub_(mean_C.unsqueeze(-1))
        return mean_C - logsumexp_C + teacher_logsumexp_C, gradient_CV.to(gradient_dtype)
    t_CV = teacher_logits_CV - teacher_logsumexp_C.unsqueeze(-1)
    q_CV = t_CV.exp()
    if kind == "forward_kl":  # D = sum q (t - s), u = -q / p
        return _dot(q_CV, t_CV.sub_(s_CV)), (p_CV - q_CV).to(gradient_dtype)
    if kind == "jsd":  # m = beta q + (1 - beta) p, u = (1 - beta) (s - log m)
        log_m_CV = _log(torch.lerp(p_CV, q_CV, jsd_beta))
        mean_C = _dot(p_CV, s_CV.sub_(log_m_CV))
        divergence_C = jsd_beta * _dot(q_CV, t_CV.sub_(log_m_CV)) + (1 - jsd_beta) * mean_C
        gradient_CV = p_CV.mul_(1 - jsd_beta) * s_CV.sub_(mean_C.unsqueeze(-1))
        return divergence_C, gradient_CV.to(gradient_dtype)
    # m = alpha q + (1 - alpha) p, D = sum q (t - log m), u = (alpha - 1) q / m
    if kind == "skew_forward_kl":
        t_CV.sub_(_log(torch.lerp(p_CV, q_CV, skew_alpha)))
        divergence_C, u_CV = _dot(q_CV, t_CV), t_CV.exp().mul_(skew_alpha - 1)
    # m = alpha p + (1 - alpha) q, D = sum p (s - log m), u = s - log m - alpha p / m
    elif kind == "skew_reverse_kl":
        s_CV.sub_(_log(torch.lerp(q_CV, p_CV, skew_alpha)))
        divergence_C, u_CV = _dot(p_CV, s_CV), s_CV - skew_alpha * s_CV.exp()
    else:
        raise ValueError(f"kind={kind!r}: no divergence of this name is computed here")
    return divergence_C, (p_CV * u_CV.sub_(_dot(p_CV, u_CV).unsqueeze(-1))).to(gradient_dtype)


def _log(m_CV: Tensor) -> Tensor:
    """log m, in place; where m underflows, a finite number that no probability will weigh."""
    return m_CV.clamp_min_(torch.finfo(m_CV.dtype).tiny).log_()


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Row by row, [C].

    On a CPU long rows go to BLAS, which writes no product; on a GPU the compiler fuses the sum.
    """
    if a_CV.is_cuda or a_CV.shape[1] < 4096:
        return (a_CV * b_CV).sum(dim=-1)
    return torch.bmm(a_CV.unsqueeze(1), b_CV.unsqueeze(2)).flatten()


@fused
def logprob_gradient(logits_CV: Tensor, logsumexp_C: Tensor, total_C: Tensor) -> Tensor:
    """-total p [C, V]: what the normaliser of log-probabilities sends back when their gradients sum
    to `total_C`.
    """
    return (logits_CV - logsumexp_C.unsqueeze(-1)).exp() * -total_C.unsqueeze(-1)


def top_k(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits_CV.topk(k)`, values descending and ids, by block maxima.

    The vocabulary is dealt to blocks. A block that holds one of the k largest has a maximum among
    the k largest maxima, so only k blocks are searched: one cheap pass over the tile and a
    selection from k * 64 columns, where a selection from 151,936 costs several times as much.
    Exact; among equal logits another id may win than in `topk`.
    """
    rows, vocab = logits_CV.shape
    blocks = vocab // TOPK_BLOCK
    if blocks < 4 * k:
        return logits_CV.topk(k, dim=-1)
    dealt = blocks * TOPK_BLOCK
    # Block b holds columns b, b + blocks, b + 2 blocks ...: its maximum is taken down whole rows of
    # a matrix.
    blocks_CJB = logits_CV[:, :dealt].view(rows, TOPK_BLOCK, blocks)
    best_CK = blocks_CJB.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    columns_CJK = best_CK.unsqueeze(1) + blocks * torch.arange(
        TOPK_BLOCK, device=logits_CV.device
    ).view(1, -1, 1)
    rest_R = torch.arange(dealt, vocab, device=logits_CV.device)
    columns_CM = torch.cat([columns_CJK.flatten(1), rest_R.expand(rows, -1)], dim=-1)
    values_CK, position_CK = logits_CV.gather(-1, columns_CM).topk(k, dim=-1)
    return values_CK, columns_CM.gather(-1, position_CK)
