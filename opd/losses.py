"""Distillation losses, one value per token: divergences, estimators, policy gradient, importance
weights.

Every function is pure: it keeps no state and never writes to its arguments. float16 and bfloat16
are computed and returned in float32, float32 and float64 stay what they are. Nothing here averages:
the script sums over loss tokens and divides by their count over all ranks. s, t are the
log-probabilities (in nats) of student and teacher, p, q their probabilities.

`divergence` is the definition. Over the full vocabulary `kernels.divergence_and_gradient` is what
trains, and tests hold it to this one; the other functions here train themselves.

Shape legend: N tokens, V vocabulary, K support size, B sequences, S padded length.
"""

import math

import torch
from torch import Tensor

from opd.topk import log_tail, upcast

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
TAILS = ("bucket", "generalized", "renormalize", "truncate")
ESTIMATORS = ("k1", "k2", "k3")
IMPORTANCE_MODES = ("none", "truncate", "mask")
IMPORTANCE_LEVELS = ("token", "sequence", "geometric")
REJECTION_LEVELS = ("none", "sequence", "geometric")

# Beyond e^20 a ratio says only that the two policies disagree; without the bound, exp overflows on
# one bad token.
MAX_LOG_RATIO = 20.0
# Stands in for -inf in an empty support slot: exp gives 0, and differences stay finite, gradients
# too.
EMPTY_LOGPROB = -1e4


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: str,
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """Full-vocabulary divergence of each token, [N], in nats.

    * `forward_kl` = sum q (t - s); `reverse_kl` = sum p (s - t)
    * `jsd` = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (arXiv 2306.13649)
    * `skew_forward_kl` = KL(q || alpha q + (1 - alpha) p); `skew_reverse_kl` = KL(p || alpha p + (1
      - alpha) q)
      (DistiLLM, arXiv 2402.03898)

    `temperature` divides the logits of both sides; no T^2 factor is added. Logits must be finite:
    cut a padded vocabulary, do not mask it with -inf. Raises ValueError for an unknown kind, beta
    or alpha outside (0, 1), or a temperature that is not positive.

    Example: p = (.9, .1), q = (.1, .9): reverse_kl = .8 ln 9 = 1.7578.
    """
    assert student_logits_NV.shape == teacher_logits_NV.shape, (
        f"student logits {student_logits_NV.shape}, teacher logits {teacher_logits_NV.shape}"
    )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    s_NV = _log_softmax(student_logits_NV, temperature)
    t_NV = _log_softmax(teacher_logits_NV, temperature)
    parts = _kl_parts(s_NV, t_NV, kind=kind, jsd_beta=jsd_beta, skew_alpha=skew_alpha)
    return sum(
        weight * (log_a.exp() * (log_a - log_b)).sum(dim=-1) for weight, log_a, log_b in parts
    )


def support_divergence(
    student_logprobs_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    *,
    kind: str,
    tail: str,
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
) -> Tensor:
    """Divergence of each token on a support of K tokens, [N], from full-vocabulary
    log-probabilities of both sides.

    `tail` says what becomes of the rest of the vocabulary:

    * `bucket`: one more outcome holds the exact rest. Zero only where the support agrees.
    * `generalized`: KL(a || b) gets `+ b - a` at each token, so that every term is >= 0 (MOPD,
      arXiv 2606.30406 Eq. 5).
      Zero only where the support agrees.
    * `renormalize`: both sides divided by their mass on the support. Biased: blind to how much mass
      the support has.
    * `truncate`: the raw sum. Biased (except jsd, where it is `generalized`): at student = teacher
      the value is 0 but
      the gradient is not, it moves mass out of the support (reverse) or into it (forward).

    A slot with -inf on both sides is empty and adds nothing (see `topk.union_support`). Raises
    ValueError for an unknown kind or tail, and for beta or alpha outside (0, 1).
    """
    assert student_logprobs_NK.shape == teacher_logprobs_NK.shape, (
        f"student logprobs {student_logprobs_NK.shape}, teacher logprobs "
        f"{teacher_logprobs_NK.shape}"
    )
    _require_choice("tail", tail, TAILS)
    empty_NK = student_logprobs_NK.isneginf() & teacher_logprobs_NK.isneginf()
    s_NK = upcast(student_logprobs_NK).masked_fill(empty_NK, EMPTY_LOGPROB)
    t_NK = upcast(teacher_logprobs_NK).masked_fill(empty_NK, EMPTY_LOGPROB)
    if tail == "bucket":
        s_NK = torch.cat([s_NK, log_tail(s_NK).unsqueeze(-1)], dim=-1)
        t_NK = torch.cat([t_NK, log_tail(t_NK).unsqueeze(-1)], dim=-1)
    elif tail == "renormalize":
        s_NK = s_NK - s_NK.logsumexp(dim=-1, keepdim=True)
        t_NK = t_NK - t_NK.logsumexp(dim=-1, keepdim=True)

    parts = _kl_parts(s_NK, t_NK, kind=kind, jsd_beta=jsd_beta, skew_alpha=skew_alpha)
    total = 0.0
    for weight, log_a, log_b in parts:
        terms_NK = log_a.exp() * (log_a - log_b)
        if tail == "generalized":
            terms_NK = terms_NK + log_b.exp() - log_a.exp()
        total = total + weight * terms_NK.sum(dim=-1)
    return total


def kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimate of KL(student || teacher) at tokens sampled from the student; same shape as the
    arguments.

    `k1` = s - t; `k2` = (s - t)^2 / 2; `k3` = e^(t - s) - (t - s) - 1 (Schulman 2020,
    "Approximating KL divergence"). As a value, k1 and k3 are unbiased. As a differentiable loss,
    k1's gradient does not contain the teacher at all: use it through `policy_gradient_loss`. Raises
    ValueError for an unknown estimator.
    """
    _require_choice("estimator", estimator, ESTIMATORS)
    log_ratio = upcast(teacher_logprobs) - upcast(student_logprobs)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


def distillation_advantage(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, clip: float | None
) -> Tensor:
    """sg[t - s], bounded to [-clip, clip] (`None`: no bound).

    Raises ValueError for a clip that is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: must be greater than 0, or None for no clipping")
    advantages = (upcast(teacher_logprobs) - upcast(student_logprobs)).detach()
    return advantages if clip is None else advantages.clamp(-clip, clip)


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Policy-gradient loss of each sampled token; the gradient flows into `logprobs` only.

    All shapes equal.

    * `clip_low=None`: REINFORCE, `-A logprobs`; old_logprobs, clip_high and dual_clip have no part
      in it.
    * else PPO with r = e^(logprobs - old_logprobs): `max(-A r, -A clip(r, 1 - clip_low, 1 +
      clip_high))` (arXiv
      1707.06347 Eq. 7); `clip_high=None` means clip_low. With `dual_clip` = c > 1, the loss of a
      negative advantage is at most `-A c` (arXiv 1912.09729).

    Raises ValueError for a dual_clip that is not above 1.
    """
    logprobs, advantages = upcast(logprobs), upcast(advantages).detach()
    if clip_low is None:
        return -advantages * logprobs
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: must be greater than 1, or None to switch it off")
    clip_high = clip_low if clip_high is None else clip_high
    log_ratio = logprobs - upcast(old_logprobs).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


@torch.no_grad()
def importance_weights(
    logprobs_BS: Tensor,
    rollout_logprobs_BS: Tensor,
    mask_BS: Tensor,
    *,
    mode: str,
    level: str,
    low: float,
    high: float,
) -> Tensor:
    """Weights [B, S] that correct for a sampler that is not the current student; detached, zero off
    the mask.

    The ratio r is trainer over sampler: of the token (`token`), of the whole sequence, the product
    of its tokens (`sequence`), or the geometric mean of its tokens (`geometric`). Its logarithm is
    bounded to +-20.

    * `none`: ones. `truncate`: min(r, high); low has no part in it. `mask`: r where low <= r <=
      high, else 0 (IcePop).

    A token of weight 0 still counts in the denominator. What stands off the mask is never read, not
    even a NaN. Raises ValueError for an unknown mode or level.
    """
    _require_choice("mode", mode, IMPORTANCE_MODES)
    _require_choice("level", level, IMPORTANCE_LEVELS)
    mask_BS = mask_BS.bool()
    log_ratio_BS = _log_ratio(logprobs_BS, rollout_logprobs_BS, mask_BS)
    if mode == "none":
        return mask_BS.to(log_ratio_BS.dtype)
    if level != "token":
        log_ratio_BS = (
            _of_sequence(log_ratio_BS, mask_BS, level).unsqueeze(-1).expand_as(log_ratio_BS)
        )
    ratio_BS = log_ratio_BS.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        weights_BS = ratio_BS.clamp(max=high)
    else:
        weights_BS = ratio_BS.masked_fill((ratio_BS < low) | (ratio_BS > high), 0.0)
    return weights_BS.masked_fill(~mask_BS, 0.0)


@torch.no_grad()
def accepted_sequences(
    logprobs_BS: Tensor,
    rollout_logprobs_BS: Tensor,
    mask_BS: Tensor,
    *,
    level: str,
    low: float,
    high: float,
) -> Tensor:
    """Which sequences may be learned from, [B] bool: those whose ratio r of trainer to sampler has
    low <= r <= high.

    r is the product of the tokens' ratios (`sequence`) or their geometric mean (`geometric`; verl
    calls it seq_mean_k1); `none` accepts all. Compared as logarithms, so that no length overflows.
    A sequence without tokens is accepted, and one whose ratio is NaN is not. What stands off the
    mask is never read.

    The tokens of a rejected sequence get the weight 0 and still count in the denominator. Raises
    ValueError for an unknown level.

    Example: two tokens of ratio 2: 4 for `sequence`, 2 for `geometric`.
    """
    _require_choice("level", level, REJECTION_LEVELS)
    mask_BS = mask_BS.bool()
    log_ratio_BS = _log_ratio(logprobs_BS, rollout_logprobs_BS, mask_BS)
    if level == "none":
        return torch.ones_like(mask_BS[:, 0])
    log_ratio_B = _of_sequence(log_ratio_BS, mask_BS, level)
    inside_B = (log_ratio_B >= math.log(low)) & (log_ratio_B <= math.log(high))
    return inside_B | ~mask_BS.any(dim=-1)


def _log_ratio(logprobs_BS: Tensor, rollout_logprobs_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Logarithm of trainer over sampler, [B, S], 0 off the mask."""
    assert logprobs_BS.shape == rollout_logprobs_BS.shape == mask_BS.shape, (
        f"logprobs {logprobs_BS.shape}, rollout logprobs {rollout_logprobs_BS.shape}, mask "
        f"{mask_BS.shape}"
    )
    return (upcast(logprobs_BS) - upcast(rollout_logprobs_BS)).masked_fill(~mask_BS, 0.0)


def _of_sequence(log_ratio_BS: Tensor, mask_BS: Tensor, level: str) -> Tensor:
    """The sum over a sequence, [B], or for `geometric` the mean over its tokens."""
    total_B = log_ratio_BS.sum(dim=-1)
    return total_B / mask_BS.sum(dim=-1).clamp(min=1) if level == "geometric" else total_B


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = upcast(logits_NV)
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return logits_NV.log_softmax(dim=-1)


def _kl_parts(
    s: Tensor, t: Tensor, *, kind: str, jsd_beta: float, skew_alpha: float
) -> list[tuple[float, Tensor, Tensor]]:
    """Each divergence as a weighted sum of KL(a || b): a list of (weight, log a, log b)."""
    _require_choice("kind", kind, DIVERGENCES)
    if kind == "forward_kl":
        return [(1.0, t, s)]
    if kind == "reverse_kl":
        return [(1.0, s, t)]
    if kind == "jsd":
        m = _log_mixture(t, s, "jsd_beta", jsd_beta)
        return [(jsd_beta, t, m), (1.0 - jsd_beta, s, m)]
    if kind == "skew_forward_kl":
        return [(1.0, t, _log_mixture(t, s, "skew_alpha", skew_alpha))]
    if kind == "skew_reverse_kl":
        return [(1.0, s, _log_mixture(s, t, "skew_alpha", skew_alpha))]
    raise ValueError(f"kind={kind!r}: it is one of DIVERGENCES, and has no parts here")


def _log_mixture(log_a: Tensor, log_b: Tensor, name: str, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b).

    The ends are refused: there the mixture is one side, a loss of another name.
    """
    if not 0.0 < weight < 1.0:
        raise ValueError(
            f"{name}={weight}: must lie between 0 and 1; for an end, choose forward_kl or "
            "reverse_kl"
        )
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
