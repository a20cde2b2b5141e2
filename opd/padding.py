"""Rollouts and scores to micro-batches. The one place where response-aligned becomes label-aligned.

B sequences, S padded length after the shift, L response length, N loss tokens, M loss tokens of one teacher, K support,
H teacher hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opd import distributed
from opd.types import MicroBatch, Rollout, TeacherScores, TeacherSlice

Scored = tuple[Rollout, tuple[TeacherScores, ...]]


def make_micro_batches(
    rollouts: Sequence[Rollout],
    scores: Sequence[tuple[TeacherScores, ...]],
    *,
    micro_batch_size: int,
    pad_id: int,
    domains: Sequence[str],
) -> list[MicroBatch]:
    """Right-padded micro-batches on the host, the same number on every rank; ranks with fewer rollouts get fully masked ones.

    Rollouts are ordered by teacher and then by length: little padding, and one teacher's head is needed at a time. Losses
    are sums over tokens divided by one global count, so neither the order nor the split changes a gradient.
    Collective. Raises ValueError if a rollout has no scores.
    """
    scored = sorted(
        zip(rollouts, scores, strict=True),
        key=lambda item: ([score.teacher for score in item[1]], _length(item[0]), item[0].prompt.prompt_id),
    )
    count = -(-len(scored) // micro_batch_size)
    (most,) = distributed.all_reduce([count], "max")
    groups = [scored[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(int(most))]
    return [collate(group, pad_id=pad_id, domains=domains) for group in groups]


def count_loss_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """Loss tokens of one optimizer step over all ranks and micro-batches: the only denominator. Collective."""
    (total,) = distributed.all_reduce([sum(mb.num_loss_tokens for mb in micro_batches)])
    return int(total)


def collate(scored: Sequence[Scored], *, pad_id: int, domains: Sequence[str]) -> MicroBatch:
    """One micro-batch; an empty `scored` gives a single fully masked row, so that its loss is a connected zero.

    Example: prompt [5, 6], response [7, 8] -> input [5, 6, 7], labels [6, 7, 8], loss mask [0, 1, 1].
    """
    B = max(1, len(scored))
    S = max([_length(rollout) - 1 for rollout, _ in scored], default=1)
    input_ids_BS = torch.full((B, S), pad_id, dtype=torch.long)
    labels_BS = torch.full((B, S), pad_id, dtype=torch.long)
    attention_mask_BS = torch.zeros((B, S), dtype=torch.bool)
    loss_mask_BS = torch.zeros((B, S), dtype=torch.bool)
    rollout_logprobs_BS = torch.zeros((B, S), dtype=torch.float32)
    for row, (rollout, _) in enumerate(scored):
        raw = torch.tensor(rollout.prompt.token_ids + rollout.response_ids)
        length, first = len(raw) - 1, len(rollout.prompt.token_ids) - 1
        assert first >= 0, f"prompt {rollout.prompt.prompt_id}: an empty prompt"
        input_ids_BS[row, :length] = raw[:-1]
        labels_BS[row, :length] = raw[1:]
        attention_mask_BS[row, :length] = True
        loss_mask_BS[row, first:length] = True
        if rollout.rollout_logprobs is not None:
            rollout_logprobs_BS[row, first:length] = torch.tensor(rollout.rollout_logprobs)
    if not scored:
        attention_mask_BS[:, 0] = True  # attention over nothing is not defined
    return MicroBatch(
        input_ids_BS=input_ids_BS,
        labels_BS=labels_BS,
        attention_mask_BS=attention_mask_BS,
        loss_mask_BS=loss_mask_BS,
        rollout_logprobs_BS=rollout_logprobs_BS,
        task_advantages_B=_per_row([r.task_advantage for r, _ in scored], 0.0, torch.float32),
        domain_ids_B=_per_row([domains.index(r.prompt.domain) for r, _ in scored], -1, torch.long),
        policy_versions_B=_per_row([r.policy_version for r, _ in scored], 0, torch.long),
        on_policy_B=_per_row([r.rollout_logprobs is not None for r, _ in scored], False, torch.bool),
        teacher_slices=_teacher_slices(scored),
    )


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)


def _per_row(values: list, filler, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values or [filler], dtype=dtype)


def _teacher_slices(scored: Sequence[Scored]) -> tuple[TeacherSlice, ...]:
    """Groups the rows' scores by teacher. Row by row, the loss tokens are the responses, one after the other."""
    parts: dict[str, list[tuple[Tensor, TeacherScores]]] = {}
    offset = 0
    for rollout, row_scores in scored:
        L = len(rollout.response_ids)
        if not row_scores:
            raise ValueError(f"prompt {rollout.prompt.prompt_id} ({rollout.prompt.domain}): no teacher scored it")
        for score in row_scores:
            _check_aligned(score, L, rollout)
            parts.setdefault(score.teacher, []).append((torch.arange(offset, offset + L), score))
        offset += L

    def joined(rows: list[TeacherScores], name: str) -> Tensor | None:
        values = [getattr(score, name) for score in rows]
        return None if values[0] is None else torch.cat(values)

    slices = []
    for teacher, entries in parts.items():
        indices, rows = [index for index, _ in entries], [score for _, score in entries]
        weights = [torch.full((len(index),), score.weight) for index, score in entries]
        slices.append(
            TeacherSlice(
                teacher=teacher,
                token_index_M=torch.cat(indices),
                weights_M=torch.cat(weights),
                sampled_logprobs_M=joined(rows, "sampled_logprobs"),
                entropy_M=joined(rows, "entropy"),
                topk_ids_MK=joined(rows, "topk_ids"),
                topk_logprobs_MK=joined(rows, "topk_logprobs"),
                hidden_MH=joined(rows, "hidden"),
            )
        )
    return tuple(slices)


def _check_aligned(score: TeacherScores, L: int, rollout: Rollout) -> None:
    for name in ("sampled_logprobs", "entropy", "topk_ids", "topk_logprobs", "hidden"):
        value = getattr(score, name)
        assert value is None or len(value) == L, (
            f"prompt {rollout.prompt.prompt_id}: {score.teacher}.{name} has {len(value)} rows for {L} response tokens"
        )
