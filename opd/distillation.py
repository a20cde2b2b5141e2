"""Student and teachers at the same tokens: the divergence on the chosen support, and what is worth
watching.

This is where a chunk of student logits meets its teachers. Several teachers of one token form a
mixture of losses, sum_i w_i D(student, teacher_i) with weights that sum to 1, so one teacher is the
mixture with the weight 1.

B sequences, N loss tokens of a micro-batch, C tokens of one chunk, M tokens of a chunk that one
teacher speaks about, K support size, V vocabulary (cut to the range that all models share), H
teacher hidden size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opd.config import LossConfig
from opd.losses import MAX_LOG_RATIO, kl_estimate, support_divergence
from opd.ops.heads import OutputHead
from opd.ops.logits import LogitsChunk
from opd.topk import overlap, union_support
from opd.types import MicroBatch, TeacherPayload, TeacherSlice

# teacher name -> its head on the device, cut to the shared vocabulary
HeadOf = Callable[[str], OutputHead]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Student against teachers at the C tokens of a chunk.

    Log-probabilities in nats, at the loss temperature.
    """

    divergence_C: Tensor | None  # None for the policy gradient, which has none
    student_logprobs_C: Tensor  # of the sampled token, differentiable
    teacher_logprobs_C: Tensor  # of the sampled token: sum_i w_i log q_i
    stats: dict[str, Tensor]  # metric key -> [C], detached; NaN where a token is not covered


@dataclass(frozen=True, slots=True)
class _Against:
    """One teacher's part of the comparison, for M tokens; the teacher's top tokens are at hand
    unless only one was sent.
    """

    divergence_M: Tensor
    teacher_logprobs_M: Tensor
    teacher_entropy_M: Tensor
    topk_ids_MK: Tensor | None = None
    topk_logprobs_MK: Tensor | None = None
    support_mass_M: tuple[Tensor, Tensor] | None = None  # student's and teacher's


def support_of(cfg: LossConfig) -> str:
    """What `auto` means: the policy gradient looks at the sampled token, every divergence at the
    full vocabulary.
    """
    if cfg.support == "auto":
        return "sampled" if cfg.loss == "reverse_kl_pg" else "full"
    return cfg.support


def payload_of(cfg: LossConfig) -> TeacherPayload:
    """What the loss needs from a teacher: the smallest thing that keeps it exact."""
    payloads: dict[str, TeacherPayload] = {
        "full": "hidden",
        "union_topk": "topk+hidden",
        "teacher_topk": "topk",
        "sampled": "sampled",
    }
    return payloads[support_of(cfg)]


def compare(
    logits: LogitsChunk, rows: slice, mb: MicroBatch, *, head_of: HeadOf, cfg: LossConfig
) -> Comparison:
    """Compares a chunk of student logits (tokens `rows` of N) with every teacher that speaks about
    them.
    """
    labels_C = mb.at_loss_tokens(mb.labels_BS)[rows]
    student_C = logits.logprobs(labels_C)
    divergence_C = teacher_C = torch.zeros_like(student_C)
    student_topk_CK = None
    if support_of(cfg) != "sampled" and cfg.overlap_k > 0:
        student_topk_CK = logits.top_k(min(cfg.overlap_k, logits.vocab))
    stats = Average(keys_of(cfg, support_of(cfg)), student_C)
    for part, index_M in _parts(mb, rows):
        # None is all of the chunk, the usual case: micro-batches are ordered by teacher.
        index = None if len(index_M) == len(labels_C) else index_M
        against = _against(part, logits, labels_C[index_M], index, head_of, cfg)
        weights_M = part.weights_M
        divergence_C = divergence_C.index_add(0, index_M, weights_M * against.divergence_M)
        teacher_C = teacher_C.index_add(0, index_M, weights_M * against.teacher_logprobs_M)
        values = _values_of(against, logits, index_M, index, student_C, student_topk_CK)
        values["distill/spilled"] = torch.full_like(weights_M, float(part.hidden_MH is None))
        stats.add(index_M, weights_M, values)
    k1_C = (student_C - teacher_C).detach()
    found = stats.values() | by_position("distill/k1", k1_C, mb.response_thirds_N[rows])
    found |= {"distill/k1": k1_C, "distill/advantage_abs": k1_C.abs()}
    found["distill/student_entropy"] = logits.entropy_C
    is_pg = cfg.loss == "reverse_kl_pg"
    return Comparison(None if is_pg else divergence_C, student_C, teacher_C, found)


@torch.no_grad()
def policy_stats(
    seen: Comparison,
    sampler_C: Tensor,
    old_C: Tensor,
    trainer_C: Tensor | None,
    weights_C: Tensor,
    cfg: LossConfig,
) -> dict[str, Tensor]:
    """What is worth watching where policies meet at the C sampled tokens: metric key -> [C].

    The log-probabilities are those of the sampler, of the old policy, and of what the weights hold
    against the sampler (`correction_weights`), which is None where nothing is corrected.
    """
    student_C, found = seen.student_logprobs_C, {}
    if cfg.old_logprobs == "server":
        found["mismatch/old_policy_gap"] = (student_C - old_C).abs()
    if cfg.clip_low is not None:
        low, high = 1 - cfg.clip_low, 1 + (cfg.clip_high or cfg.clip_low)
        ratio_C = (student_C - old_C).exp()
        found["distill/ratio_clip_fraction"] = ((ratio_C < low) | (ratio_C > high)).float()
    if cfg.loss == "reverse_kl_pg":
        advantages_C = seen.teacher_logprobs_C - student_C
        limit = math.inf if cfg.advantage_clip is None else cfg.advantage_clip
        found["distill/advantage_abs"] = advantages_C.abs().clamp(max=limit)
        found["distill/clip_fraction"] = (advantages_C.abs() > limit).float()
    if trainer_C is not None:
        found["mismatch/weight_mean"] = weights_C
        found["mismatch/weight_zero_fraction"] = (weights_C == 0).float()
        found["mismatch/clamp_fraction"] = ((trainer_C - sampler_C).abs() > MAX_LOG_RATIO).float()
        if cfg.is_mode != "none":
            found["mismatch/weight_cut_fraction"] = (weights_C >= cfg.is_high).float()
    return found


def _parts(mb: MicroBatch, rows: slice) -> Iterator[tuple[TeacherSlice, Tensor]]:
    """Each teacher's share of the chunk, with the positions [M] inside the chunk that it speaks
    about.
    """
    for whole in mb.teacher_slices:
        bounds = torch.tensor([rows.start, rows.stop], device=whole.token_index_M.device)
        start, stop = torch.searchsorted(whole.token_index_M, bounds).tolist()
        if start < stop:
            part = whole.cut(start, stop)
            yield part, part.token_index_M - rows.start


def _against(
    part: TeacherSlice,
    logits: LogitsChunk,
    labels_M: Tensor,
    index_M: Tensor | None,
    head_of: HeadOf,
    cfg: LossConfig,
) -> _Against:
    """One teacher on the support that the loss asks for, or on its top-k where the cache had no
    room for hidden states.
    """
    support, options = support_of(cfg), {"jsd_beta": cfg.jsd_beta, "skew_alpha": cfg.skew_alpha}
    if support == "full" and part.hidden_MH is not None:
        head, topk = head_of(part.teacher), min(cfg.overlap_k, logits.vocab)
        hidden_MH = part.hidden_MH.to(head.weight_VH.dtype)
        options |= {"kind": cfg.loss, "topk": topk}
        return _Against(*logits.divergence(hidden_MH, head, labels_M, index_M, **options))
    if support == "sampled":
        student_M = logits.logprobs(labels_M, index_M)
        if cfg.loss == "reverse_kl_pg":
            divergence_M = torch.zeros_like(student_M)
        else:
            estimator = "k3" if cfg.estimator == "auto" else cfg.estimator
            divergence_M = kl_estimate(student_M, part.sampled_logprobs_M, estimator=estimator)
        return _Against(divergence_M, part.sampled_logprobs_M, _entropy(part))
    ids_MK, teacher_MK, repeated_MK = part.topk_ids_MK, part.topk_logprobs_MK, None
    if support == "union_topk" and part.hidden_MH is not None:
        ids_MK, teacher_MK, repeated_MK = _union(part, logits, index_M, head_of(part.teacher), cfg)
    student_MK = logits.logprobs(ids_MK, index_M)
    if repeated_MK is not None:  # an empty slot on both sides
        student_MK = student_MK.masked_fill(repeated_MK, -torch.inf)
        teacher_MK = teacher_MK.masked_fill(repeated_MK, -torch.inf)
    options |= {"kind": cfg.loss, "tail": cfg.tail}
    divergence_M = support_divergence(student_MK, teacher_MK, **options)
    mass = (student_MK.detach().exp().sum(-1), teacher_MK.exp().sum(-1))
    top = (part.topk_ids_MK, part.topk_logprobs_MK)
    return _Against(divergence_M, part.sampled_logprobs_M, _entropy(part), *top, mass)


@torch.no_grad()
def _values_of(
    against: _Against,
    logits: LogitsChunk,
    index_M: Tensor,
    index: Tensor | None,
    student_C: Tensor,
    student_topk_CK: Tensor | None,
) -> dict[str, Tensor]:
    """What is worth watching of one teacher at its M tokens: metric key -> [M]."""
    values = {
        "distill/teacher_entropy": against.teacher_entropy_M,
        "distill/entropy_gap": (against.teacher_entropy_M - logits.entropy_C[index_M]).abs(),
        "distill/k3": kl_estimate(student_C[index_M], against.teacher_logprobs_M, estimator="k3"),
    }
    if against.support_mass_M is not None:
        values["distill/student_mass"], values["distill/teacher_mass"] = against.support_mass_M
    if student_topk_CK is not None and against.topk_ids_MK is not None:
        # a teacher may have sent fewer
        K = min(student_topk_CK.shape[1], against.topk_ids_MK.shape[1])
        ids_MK = against.topk_ids_MK[:, :K]
        values |= overlap_of(
            student_topk_CK[index_M, :K],
            ids_MK,
            logits.gather(ids_MK, index),
            against.topk_logprobs_MK[:, :K],
        )
    return values


def _entropy(part: TeacherSlice) -> Tensor:
    """The teacher's, [M]; NaN where it does not say, as a vLLM server does not."""
    return (
        torch.full_like(part.sampled_logprobs_M, torch.nan)
        if part.entropy_M is None
        else part.entropy_M
    )


@torch.no_grad()
def _union(
    part: TeacherSlice,
    logits: LogitsChunk,
    index_M: Tensor | None,
    head: OutputHead,
    cfg: LossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, teacher's log-probabilities, is a repetition), each [M, 2K]: the teacher's top-k and
    the student's, of now.

    The teacher's logits at the student's tokens are K products of a hidden state with rows of the
    head, not V of them.
    """
    student_ids_MK = logits.top_k(part.topk_ids_MK.shape[1], index_M)
    z_MK = _logits_at(part.hidden_MH, head, student_ids_MK, cfg.chunk_bytes)
    theirs_MK = head.form(z_MK) / cfg.loss_temperature - part.logsumexp_M.unsqueeze(-1)
    ids_MJ, repeated_MJ = union_support(part.topk_ids_MK, student_ids_MK)
    return ids_MJ, torch.cat([part.topk_logprobs_MK, theirs_MK], dim=-1), repeated_MJ


def _logits_at(hidden_MH: Tensor, head: OutputHead, ids_MK: Tensor, piece_bytes: int) -> Tensor:
    """hidden @ weight.T + bias at single ids, [M, K], in float32 at least; rows of the head are
    gathered piece by piece.
    """
    wide = torch.promote_types(head.weight_VH.dtype, torch.float32)
    rows = max(1, piece_bytes // (2 * ids_MK.shape[1] * head.weight_VH.shape[1] * wide.itemsize))
    z_MK = hidden_MH.new_empty(ids_MK.shape, dtype=wide)
    for piece in (slice(start, start + rows) for start in range(0, len(ids_MK), rows)):
        weight_PKH = F.embedding(ids_MK[piece], head.weight_VH).to(wide)
        z_MK[piece] = torch.einsum("ph,pkh->pk", hidden_MH[piece].to(wide), weight_PKH)
    return z_MK if head.bias_V is None else z_MK + head.bias_V[ids_MK]


POSITIONS = ("front", "middle", "tail")


def keys_of(cfg: LossConfig, support: str) -> tuple[str, ...]:
    """What teachers are asked for each token: the same for every chunk of a run."""
    keys = ("distill/k3", "distill/teacher_entropy", "distill/entropy_gap")
    if support == "sampled":
        return keys
    if cfg.overlap_k > 0:
        keys += ("distill/overlap_ratio", "distill/overlap_mass", "distill/overlap_advantage")
    if support != "teacher_topk":
        keys += ("distill/spilled",)
    return (*keys, "distill/student_mass", "distill/teacher_mass")


class Average:
    """Values of several teachers at the tokens of a chunk, averaged with the teachers' weights; NaN
    where nobody spoke.
    """

    def __init__(self, keys: tuple[str, ...], like_C: Tensor):
        zero_C = torch.zeros_like(like_C)
        self.sums, self.weights = dict.fromkeys(keys, zero_C), dict.fromkeys(keys, zero_C)

    def add(self, index_M: Tensor, weights_M: Tensor, values: dict[str, Tensor]) -> None:
        """Keys that the average was not made for are passed over."""
        for key, value_M in values.items():
            if key not in self.sums:
                continue
            known_M = (weights_M * ~value_M.isnan()).to(self.weights[key].dtype)
            self.sums[key] = self.sums[key].index_add(
                0, index_M, known_M * value_M.masked_fill(value_M.isnan(), 0)
            )
            self.weights[key] = self.weights[key].index_add(0, index_M, known_M)

    def values(self) -> dict[str, Tensor]:
        # 0 / 0 is the NaN of no one
        return {key: self.sums[key] / self.weights[key] for key in self.sums}


def overlap_of(
    student_ids_MK: Tensor,
    teacher_ids_MK: Tensor,
    student_logprobs_MK: Tensor,
    teacher_logprobs_MK: Tensor,
) -> dict[str, Tensor]:
    """How far the top-K sets agree; the log-probabilities are those of the teacher's ids.

    The advantage is the mean over the common tokens v of p'(v) (log q'(v) - log p'(v)), p' and q'
    renormalised on them (arXiv 2604.13016): at most 0, NaN where no token is common.

    Example: student (1, 2), teacher (2, 5): ratio 1/2; one common token, so p' = q' = 1 and the
    advantage is 0.
    """
    common_MK = (teacher_ids_MK.unsqueeze(-1) == student_ids_MK.unsqueeze(-2)).any(dim=-1)
    p_MK = student_logprobs_MK.masked_fill(~common_MK, -torch.inf).log_softmax(-1)
    q_MK = teacher_logprobs_MK.masked_fill(~common_MK, -torch.inf).log_softmax(-1)
    terms_MK = (p_MK.exp() * (q_MK - p_MK)).masked_fill(~common_MK, 0.0)
    count_M = overlap(teacher_ids_MK, student_ids_MK)
    return {
        "distill/overlap_ratio": count_M / student_ids_MK.shape[-1],
        "distill/overlap_mass": (student_logprobs_MK.exp() * common_MK).sum(-1),
        "distill/overlap_advantage": terms_MK.sum(-1) / count_M,  # 0 / 0 where nothing is common
    }


def by_position(key: str, value_C: Tensor, third_C: Tensor) -> dict[str, Tensor]:
    """`key`_front, _middle and _tail: the value where the token stands in that third of its
    response, else NaN.
    """
    return {
        f"{key}_{name}": value_C.masked_fill(third_C != i, torch.nan)
        for i, name in enumerate(POSITIONS)
    }
