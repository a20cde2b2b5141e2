"""Student and teachers at the same tokens: the divergence on the chosen support, and what is worth watching.

This is where a chunk of student logits meets its teachers. Several teachers of one token form a mixture of losses,
sum_i w_i D(student, teacher_i) with weights that sum to 1, so one teacher is the mixture with the weight 1.

B sequences, N loss tokens of a micro-batch, C tokens of one chunk, M tokens of a chunk that one teacher speaks about,
K support size, V vocabulary (cut to the range that all models share), H teacher hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opd.config import LossConfig
from opd.losses import divergence, kl_estimate, support_divergence
from opd.topk import gather_logprobs, upcast
from opd.types import MicroBatch, TeacherPayload, TeacherSlice

HeadOf = Callable[[str], Tensor]  # teacher name -> its head [V, H] on the device


@dataclass(frozen=True, slots=True)
class Comparison:
    """Student against teachers at the C tokens of a chunk. Log-probabilities in nats, at the loss temperature."""

    divergence_C: Tensor | None  # None for the policy gradient, which has none
    student_logprobs_C: Tensor  # of the sampled token, differentiable
    teacher_logprobs_C: Tensor  # of the sampled token: sum_i w_i log q_i
    stats: dict[str, Tensor]  # metric key -> [C], detached


def support_of(cfg: LossConfig) -> str:
    """What `auto` means: the policy gradient looks at the sampled token, every divergence at the full vocabulary."""
    if cfg.support == "auto":
        return "sampled" if cfg.loss == "reverse_kl_pg" else "full"
    return cfg.support


def payload_of(cfg: LossConfig) -> TeacherPayload:
    """What the loss needs from a teacher: the smallest thing that keeps it exact."""
    payloads: dict[str, TeacherPayload] = {"full": "hidden", "teacher_topk": "topk", "sampled": "sampled"}
    return payloads[support_of(cfg)]


def compare(
    logits_CV: Tensor, rows: slice, mb: MicroBatch, *, head_of: HeadOf, shared_vocab: int, cfg: LossConfig
) -> Comparison:
    """Compares a chunk of student logits (tokens `rows` of N) with every teacher that speaks about them."""
    logits_CV = logits_CV[:, :shared_vocab]
    labels_C = mb.at_loss_tokens(mb.labels_BS)[rows]
    student_logprobs_C = gather_logprobs(logits_CV / cfg.loss_temperature, labels_C)
    zero_C = torch.zeros_like(student_logprobs_C)
    divergence_C = zero_C + student_logprobs_C[:0].sum()  # connected: no teacher speaks about a filler
    teacher_logprobs_C = zero_C
    stats = {key: zero_C for key in _stat_keys(cfg)}
    for part, index_M in _parts(mb, rows):
        covers_all = len(index_M) == len(labels_C)
        logits_MV = logits_CV if covers_all else logits_CV[index_M]
        student_M = student_logprobs_C if covers_all else student_logprobs_C[index_M]
        divergence_M, teacher_M, part_stats = _against(part, logits_MV, student_M, labels_C[index_M], head_of, cfg)
        divergence_C = divergence_C.index_add(0, index_M, part.weights_M * divergence_M)
        teacher_logprobs_C = teacher_logprobs_C.index_add(0, index_M, part.weights_M * teacher_M)
        for key, value_M in part_stats.items():
            stats[key] = stats[key].index_add(0, index_M, part.weights_M * value_M.detach())
    with torch.no_grad():
        stats["distill/k1"] = student_logprobs_C - teacher_logprobs_C
        stats["distill/student_entropy"] = _entropy(logits_CV / cfg.loss_temperature)
    return Comparison(
        None if cfg.loss == "reverse_kl_pg" else divergence_C, student_logprobs_C, teacher_logprobs_C, stats
    )


def _stat_keys(cfg: LossConfig) -> tuple[str, ...]:
    keys = ("distill/k3", "distill/teacher_entropy")
    return (*keys, "distill/student_mass", "distill/teacher_mass") if support_of(cfg) == "teacher_topk" else keys


def _parts(mb: MicroBatch, rows: slice) -> Iterator[tuple[TeacherSlice, Tensor]]:
    """Each teacher's share of the chunk, with the positions [M] inside the chunk that it speaks about."""
    for whole in mb.teacher_slices:
        bounds = torch.tensor([rows.start, rows.stop], device=whole.token_index_M.device)
        start, stop = torch.searchsorted(whole.token_index_M, bounds).tolist()
        if start == stop:
            continue

        def cut(values: Tensor | None, start=start, stop=stop) -> Tensor | None:
            return None if values is None else values[start:stop]

        part = TeacherSlice(
            teacher=whole.teacher,
            token_index_M=cut(whole.token_index_M),
            weights_M=cut(whole.weights_M),
            sampled_logprobs_M=cut(whole.sampled_logprobs_M),
            entropy_M=cut(whole.entropy_M),
            topk_ids_MK=cut(whole.topk_ids_MK),
            topk_logprobs_MK=cut(whole.topk_logprobs_MK),
            hidden_MH=cut(whole.hidden_MH),
        )
        yield part, part.token_index_M - rows.start


def _against(
    part: TeacherSlice, logits_MV: Tensor, student_M: Tensor, labels_M: Tensor, head_of: HeadOf, cfg: LossConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(divergence [M], the teacher's log-probability of the sampled token [M], statistics) for one teacher."""
    support = support_of(cfg)
    form = {"kind": cfg.loss, "jsd_beta": cfg.jsd_beta, "skew_alpha": cfg.skew_alpha}
    stats = {}
    if support == "full":
        head_VH = head_of(part.teacher)
        with torch.no_grad():
            teacher_logits_MV = upcast(F.linear(part.hidden_MH.to(head_VH.dtype), head_VH))
            teacher_M = gather_logprobs(teacher_logits_MV / cfg.loss_temperature, labels_M)
            stats["distill/teacher_entropy"] = _entropy(teacher_logits_MV / cfg.loss_temperature)
        divergence_M = divergence(logits_MV, teacher_logits_MV, temperature=cfg.loss_temperature, **form)
    else:
        teacher_M = part.sampled_logprobs_M
        stats["distill/teacher_entropy"] = part.entropy_M
        if support == "teacher_topk":
            student_MK = gather_logprobs(logits_MV / cfg.loss_temperature, part.topk_ids_MK)
            divergence_M = support_divergence(student_MK, part.topk_logprobs_MK, tail=cfg.tail, **form)
            stats["distill/student_mass"] = student_MK.exp().sum(-1)
            stats["distill/teacher_mass"] = part.topk_logprobs_MK.exp().sum(-1)
        elif cfg.loss == "reverse_kl_pg":
            divergence_M = torch.zeros_like(student_M)
        else:
            estimator = "k3" if cfg.estimator == "auto" else cfg.estimator
            divergence_M = kl_estimate(student_M, teacher_M, estimator=estimator)
    stats["distill/k3"] = kl_estimate(student_M.detach(), teacher_M, estimator="k3")
    return divergence_M, teacher_M, stats


def _entropy(logits_NV: Tensor) -> Tensor:
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)
