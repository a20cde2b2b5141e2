"""The passes over a vocabulary that a loss is made of: statistics, divergence with its gradient, top-k.

Each takes a tile: some rows of logits, float32 or float64, over the whole vocabulary. `tiles` cuts them so small on a
CPU that a tile stays in a core's cache from its first pass to its last; what these passes cost is memory traffic. On a
GPU a tile is everything at hand and `fused` compiles the passes into few kernels. `losses.divergence` is the definition;
the tests hold these to its values and to its gradients.

Shape legend: C rows (tokens), V vocabulary, K ids per row.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE_BYTES = 1 << 20  # a core's second-level cache holds the handful of tensors that a kernel makes of a tile
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
    """`kernel`, compiled where it runs on a GPU. Its options (which divergence, which weights) become constants."""
    compiled = functools.cache(lambda: torch.compile(kernel, dynamic=True))  # torch's compiler takes seconds to import

    @functools.wraps(kernel)
    def run(first_CV: Tensor, *arguments, **options):
        return (compiled() if first_CV.is_cuda else kernel)(first_CV, *arguments, **options)

    return run


@fused
def statistics(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp [C], entropy [C] in nats). With x = logits - max and Z = sum e^x: log Z - sum(x e^x) / Z."""
    max_C1 = logits_CV.amax(dim=-1, keepdim=True)
    x_CV = logits_CV - max_C1
    exp_CV = x_CV.exp()
    z_C = exp_CV.sum(dim=-1)
    return max_C1.squeeze(-1) + z_C.log(), z_C.log() - (exp_CV * x_CV).sum(dim=-1) / z_C


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
) -> tuple[Tensor, Tensor]:
    """(D [C], dD/dlogits [C, V]) of the divergences of `losses.divergence`.

    Each of them is a sum over the vocabulary whose derivative with respect to p, at fixed q, is u up to a constant;
    through the softmax it becomes p (u - sum p u).
    """
    s_CV = logits_CV - logsumexp_C.unsqueeze(-1)
    t_CV = teacher_logits_CV - teacher_logsumexp_C.unsqueeze(-1)
    p_CV = s_CV.exp()
    if kind == "reverse_kl":  # u is the integrand over p, so the sums are one
        u_CV = s_CV - t_CV
        divergence_C = (p_CV * u_CV).sum(dim=-1)
        return divergence_C, p_CV * (u_CV - divergence_C.unsqueeze(-1))
    q_CV = t_CV.exp()
    if kind == "forward_kl":  # u = -q / p
        return (q_CV * (t_CV - s_CV)).sum(dim=-1), p_CV - q_CV
    if kind == "jsd":  # m = beta q + (1 - beta) p
        log_m_CV = _log_mixture(q_CV, p_CV, jsd_beta)
        student_term_CV = (1 - jsd_beta) * (s_CV - log_m_CV)  # and it is u as well
        terms_CV, u_CV = jsd_beta * q_CV * (t_CV - log_m_CV) + p_CV * student_term_CV, student_term_CV
    elif kind == "skew_forward_kl":  # m = alpha q + (1 - alpha) p
        log_m_CV = _log_mixture(q_CV, p_CV, skew_alpha)
        terms_CV, u_CV = q_CV * (t_CV - log_m_CV), (skew_alpha - 1) * (t_CV - log_m_CV).exp()
    else:  # skew_reverse_kl: m = alpha p + (1 - alpha) q
        log_m_CV = _log_mixture(p_CV, q_CV, skew_alpha)
        terms_CV = p_CV * (s_CV - log_m_CV)
        u_CV = s_CV - log_m_CV - skew_alpha * (s_CV - log_m_CV).exp()
    return terms_CV.sum(dim=-1), p_CV * (u_CV - (p_CV * u_CV).sum(dim=-1, keepdim=True))


def _log_mixture(a_CV: Tensor, b_CV: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b); where both probabilities underflow, a finite number that nothing will weigh."""
    mixture_CV = weight * a_CV + (1 - weight) * b_CV
    return mixture_CV.clamp_min(torch.finfo(mixture_CV.dtype).tiny).log()


@fused
def logprob_gradient(logits_CV: Tensor, logsumexp_C: Tensor, total_C: Tensor) -> Tensor:
    """-total p [C, V]: what the normaliser of log-probabilities sends back when their gradients sum to `total_C`."""
    return (logits_CV - logsumexp_C.unsqueeze(-1)).exp() * -total_C.unsqueeze(-1)


def top_k(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits_CV.topk(k)`, values descending and ids, by block maxima.

    The vocabulary is dealt to blocks. A block that holds one of the k largest has a maximum among the k largest maxima,
    so only k blocks are searched: one cheap pass over the tile and a selection from k * 64 columns, where a selection
    from 151,936 costs five times as much. Exact; among equal logits another id may win than in `topk`.
    """
    rows, vocab = logits_CV.shape
    blocks = vocab // TOPK_BLOCK
    if blocks < 4 * k:
        return logits_CV.topk(k, dim=-1)
    dealt = blocks * TOPK_BLOCK
    # Block b holds columns b, b + blocks, b + 2 blocks ...: its maximum is taken down whole rows of a matrix.
    blocks_CJB = logits_CV[:, :dealt].view(rows, TOPK_BLOCK, blocks)
    best_CK = blocks_CJB.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    columns_CJK = best_CK.unsqueeze(1) + blocks * torch.arange(TOPK_BLOCK, device=logits_CV.device).view(1, -1, 1)
    rest_R = torch.arange(dealt, vocab, device=logits_CV.device)
    columns_CM = torch.cat([columns_CJK.flatten(1), rest_R.expand(rows, -1)], dim=-1)
    values_CK, position_CK = logits_CV.gather(-1, columns_CM).topk(k, dim=-1)
    return values_CK, columns_CM.gather(-1, position_CK)
