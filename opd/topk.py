"""Log-probabilities on a support set: top-k, gather, exact tail mass, overlap.

A log-probability here is always over the full vocabulary and never renormalised, so what a support
leaves out is known exactly: `1 - sum(exp(logprobs_NK))`.

Shape legend: N tokens, V vocabulary, K and J support sizes, M = K + J.
"""

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 come back as they are (the same
    tensor).
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def topk_logprobs(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens: `(ids_NK int64, logprobs_NK descending, logsumexp_N)`, in nats.

    Raises ValueError when k is outside 1..V.
    """
    vocab_size = logits_NV.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"support_k={k}: must be between 1 and the vocabulary size {vocab_size}")
    logits_NV = upcast(logits_NV)
    logsumexp_N = logits_NV.logsumexp(dim=-1)
    top_logits_NK, ids_NK = logits_NV.topk(k, dim=-1)
    return ids_NK, top_logits_NK - logsumexp_N.unsqueeze(-1), logsumexp_N


def gather_logprobs(logits_NV: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities at `ids`, int64 [N] or [N, K]; the result has the shape of `ids`.

    Written as gather minus logsumexp, so the forward never holds a second tensor of logits_NV's
    size.
    """
    logits_NV = upcast(logits_NV)
    assert ids.shape[: logits_NV.ndim - 1] == logits_NV.shape[:-1], (
        f"ids {ids.shape}, logits {logits_NV.shape}"
    )
    ids_NK = ids if ids.ndim == logits_NV.ndim else ids.unsqueeze(-1)
    logprobs_NK = logits_NV.gather(-1, ids_NK) - logits_NV.logsumexp(dim=-1, keepdim=True)
    return logprobs_NK.view_as(ids)


def log_tail(logprobs_NK: Tensor) -> Tensor:
    """`log(1 - sum_K exp(logprobs))` -> [N]: the exact log-probability of everything outside the
    support.

    The tail is floored at the dtype's epsilon (about e^-16 in float32, e^-36 in float64), because
    below it lies only the rounding of the support's mass. At the floor the gradient is zero, so
    mass 1 is finite both ways.

    Example: a support with probabilities (.5, .25) has `log_tail = log(.25)`.
    """
    logprobs_NK = upcast(logprobs_NK)
    log_mass_N = logprobs_NK.logsumexp(dim=-1).clamp(max=-torch.finfo(logprobs_NK.dtype).eps)
    return torch.log(-torch.expm1(log_mass_N))


def overlap(ids_NK: Tensor, other_ids_NJ: Tensor) -> Tensor:
    """How many of a row's ids also stand in the other row, int64 [N]; ids are distinct within a
    row.

    Example: (1, 2, 3) and (3, 1, 9) overlap in 2.
    """
    return (ids_NK.unsqueeze(-1) == other_ids_NJ.unsqueeze(-2)).any(dim=-1).sum(dim=-1)


def union_support(ids_NK: Tensor, other_ids_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Both supports side by side: `(ids_NM, is_duplicate_NM bool)`; an id of `other` already in
    `ids` is a duplicate.

    A union has a different size in each row, a tensor has not: set the log-probabilities of
    duplicates to -inf on both sides and `losses.support_divergence` takes the slot as empty.

    Example: (1, 2) and (2, 5) give ids (1, 2, 2, 5) and duplicates (no, no, yes, no).
    """
    repeated_NJ = (other_ids_NJ.unsqueeze(-1) == ids_NK.unsqueeze(-2)).any(dim=-1)
    fresh_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    return torch.cat([ids_NK, other_ids_NJ], dim=-1), torch.cat([fresh_NK, repeated_NJ], dim=-1)
