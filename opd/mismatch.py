"""How far sampler and trainer are apart at the tokens that the sampler chose. docs/metrics.md says
how to read it.

Trainer means the log-probabilities a micro-batch carries as `old_logprobs_BS`. All of it is sums,
in float64 where squares of ratios are summed, so that nothing depends on how a step is cut into
micro-batches or dealt to ranks.

B sequences, S padded length, N tokens of responses that the student wrote itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd.config import LossConfig
from opd.losses import MAX_LOG_RATIO, accepted_sequences, importance_weights
from opd.records.metrics import Metrics
from opd.types import MicroBatch

# Below this share of the mean square, a variance worked out from sums is rounding.
MIN_VARIANCE = 1e-12


def corrects(cfg: LossConfig) -> bool:
    """Whether the loss weighs a token by how likely trainer and sampler are to write it."""
    return cfg.is_mode != "none" or cfg.reject_level != "none"


@torch.no_grad()
def log_mismatch(
    metrics: Metrics,
    micro_batches: Sequence[MicroBatch],
    cfg: LossConfig,
    *,
    domains: Sequence[str],
) -> None:
    """Adds `mismatch/*` of micro-batches `with_old_logprobs`.

    What the student did not write has no sampler.
    """
    for mb in micro_batches:
        assert mb.old_logprobs_BS is not None, (
            "a micro-batch without the trainer's log-probabilities"
        )
        mask_BS = mb.loss_mask_BS & mb.on_policy_B[:, None]
        _log_tokens(metrics, mb.old_logprobs_BS[mask_BS], mb.rollout_logprobs_BS[mask_BS])
        trio = (mb.old_logprobs_BS.double(), mb.rollout_logprobs_BS.double(), mask_BS)
        _log_weights(metrics, *trio, cfg)
        _log_sequences(metrics, *trio)
        if cfg.reject_level != "none":
            accepted_B = accepted_sequences(
                *trio, level=cfg.reject_level, low=cfg.reject_low, high=cfg.reject_high
            )
            _log_rejected(metrics, ~accepted_B, mask_BS.any(dim=-1), mb.domain_ids_B, domains)


def _log_tokens(metrics: Metrics, trainer_N: Tensor, sampler_N: Tensor) -> None:
    log_ratio_N = trainer_N - sampler_N
    count = len(log_ratio_N)
    metrics.add("mismatch/k1", -log_ratio_N.sum(), count)
    metrics.add("mismatch/k3", (log_ratio_N.exp() - log_ratio_N - 1).sum(), count)
    metrics.add("mismatch/abs_mean", log_ratio_N.abs().sum(), count)
    if count:
        metrics.add_max("mismatch/abs_max", log_ratio_N.abs().max())
    metrics.add("mismatch/chi2_token", _chi2(log_ratio_N.double()), count)
    p_N, b_N = trainer_N.double().exp(), sampler_N.double().exp()
    metrics.add("mismatch/prob_gap", (p_N - b_N).abs().sum(), count)
    moments = (
        count,
        p_N.sum(),
        b_N.sum(),
        p_N.square().sum(),
        b_N.square().sum(),
        (p_N * b_N).sum(),
    )
    metrics.add_derived("mismatch/pearson", pearson, moments)


def _log_sequences(
    metrics: Metrics, trainer_BS: Tensor, sampler_BS: Tensor, mask_BS: Tensor
) -> None:
    length_B = mask_BS.sum(dim=-1)
    whole_B = (trainer_BS - sampler_BS).masked_fill(~mask_BS, 0).sum(dim=-1)[length_B > 0]
    mean_B = whole_B / length_B[length_B > 0]
    metrics.add(
        "mismatch/ppl_ratio",
        (-mean_B).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().sum(),
        len(whole_B),
    )
    metrics.add("mismatch/chi2_sequence", _chi2(whole_B), len(whole_B))


def _log_weights(
    metrics: Metrics, trainer_BS: Tensor, sampler_BS: Tensor, mask_BS: Tensor, cfg: LossConfig
) -> None:
    """The ratios at the level of the weights: how many leave the bounds, and what the weights leave
    of the batch.
    """
    trio, bounds = (trainer_BS, sampler_BS, mask_BS), {"level": cfg.is_level, "low": cfg.is_low}
    ratio_N = importance_weights(*trio, mode="truncate", high=math.inf, **bounds)[mask_BS]
    outside_N = (ratio_N < cfg.is_low) | (ratio_N > cfg.is_high)
    metrics.add("mismatch/out_of_bounds", outside_N.sum(), len(ratio_N))
    weights_N = ratio_N
    if cfg.is_mode != "none":
        weights_N = importance_weights(*trio, mode=cfg.is_mode, high=cfg.is_high, **bounds)[mask_BS]
    if cfg.reject_level != "none":
        accepted_B = accepted_sequences(
            *trio, level=cfg.reject_level, low=cfg.reject_low, high=cfg.reject_high
        )
        weights_N = weights_N * accepted_B[:, None].expand_as(mask_BS)[mask_BS]
    moments = (len(weights_N), weights_N.sum(), weights_N.square().sum())
    metrics.add_derived("mismatch/ess", effective_share, moments)


def _log_rejected(
    metrics: Metrics,
    rejected_B: Tensor,
    real_B: Tensor,
    domain_ids_B: Tensor,
    domains: Sequence[str],
) -> None:
    metrics.add("mismatch/rejected", rejected_B.sum(), real_B.sum())
    for index, domain in enumerate(domains):
        here_B = real_B & (domain_ids_B == index)
        metrics.add(f"mismatch/rejected/{domain}", (rejected_B & here_B).sum(), here_B.sum())


def _chi2(log_ratio: Tensor) -> Tensor:
    """Sum of r^2 - 1 over items: its mean estimates the chi-square divergence of the trainer from
    the sampler.
    """
    return torch.expm1(2 * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).sum()


def pearson(count: float, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    """Correlation of x and y from their sums and those of their products; None where one of them
    does not vary.
    """
    variance_x, variance_y = count * xx - x * x, count * yy - y * y
    if variance_x <= MIN_VARIANCE * count * xx or variance_y <= MIN_VARIANCE * count * yy:
        return None
    # their product may underflow
    return (count * xy - x * y) / (math.sqrt(variance_x) * math.sqrt(variance_y))


def effective_share(count: float, total: float, squares: float) -> float | None:
    """Kish's effective sample size over the sample size, (sum w)^2 / (n sum w^2); None where
    nothing has weight.
    """
    return total * total / (count * squares) if squares > 0 else None
