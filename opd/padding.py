"""Rollouts and scores to micro-batches. The one place where response-aligned becomes label-aligned.

B sequences, S padded length after the shift, L response length, N loss tokens, M loss tokens of one
teacher, K support, H teacher hidden size.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from opd import distributed
from opd.types import MicroBatch, Prompt, Rollout, TeacherScores, TeacherSlice

Scored = tuple[Rollout, tuple[TeacherScores, ...]]

# What a micro-batch costs beside its tokens (weights are gathered and read, kernels started), in
# full micro-batches. A guess, but not a delicate one: it says how much padding is worth a
# micro-batch more.
FIXED_COST = 0.25

# Fields of TeacherScores with one row per response token, and what they are called in a
# TeacherSlice.
PAYLOAD = {
    "sampled_logprobs": "sampled_logprobs_M",
    "entropy": "entropy_M",
    "logsumexp": "logsumexp_M",
    "topk_ids": "topk_ids_MK",
    "topk_logprobs": "topk_logprobs_MK",
    "hidden": "hidden_MH",
}


def make_micro_batches(
    rollouts: Sequence[Rollout],
    scores: Sequence[tuple[TeacherScores, ...]],
    *,
    micro_batch_size: int,
    max_tokens: int = 0,
    packed: bool = False,
    pad_id: int,
    domains: Sequence[str],
    placeholder_ids: Collection[int] = (),
    shared_vocab: int | None = None,
    filler: Prompt | None = None,
) -> list[MicroBatch]:
    """Right-padded micro-batches on the host, the same number on every rank; ranks with fewer get
    fully masked ones.

    Rollouts are ordered by teacher and then by length: little padding, and one teacher's head is
    needed at a time. A micro-batch is `micro_batch_size` of them; or, with `max_tokens` > 0, as
    many as fit that many tokens: rows times the longest, both after the shift, or, for a student
    that runs its rows `packed` into one, the sum of lengths. Losses are sums over tokens divided by
    one global count, so neither the order nor the split changes a gradient. On several ranks the
    largest micro-batch comes first: under ZeRO-3 all ranks compute their first together, then their
    second, and each time wait for the slowest.

    A last token that is one of `placeholder_ids`, or beyond `shared_vocab`, may be no loss token:
    see `_num_loss_tokens`. `filler` is a prompt with images, for a run that has some: where one
    rank's micro-batch has images, all ranks run their image encoders, whose weights and gradients
    are shared too. Collective. Raises ValueError if a rollout has no scores, or is longer than
    `max_tokens`.
    """
    scored = sorted(
        zip(rollouts, scores, strict=True),
        key=lambda item: (
            [score.teacher for score in item[1]],
            _length(item[0]),
            item[0].prompt.prompt_id,
        ),
    )
    if max_tokens:
        groups = _cut_by_tokens(scored, max_tokens, packed)
    else:
        groups = [scored[i : i + micro_batch_size] for i in range(0, len(scored), micro_batch_size)]
    if distributed.world_size() > 1:
        groups.sort(key=lambda group: -_computed([_length(r) - 1 for r, _ in group], packed))
    (most,) = distributed.all_reduce([len(groups)], "max")
    groups += [[]] * (int(most) - len(groups))
    see = [any(rollout.prompt.images for rollout, _ in group) for group in groups]
    somebody_sees = distributed.all_reduce([float(s) for s in see], "max") if filler else see
    return [
        collate(
            group,
            pad_id=pad_id,
            domains=domains,
            placeholder_ids=placeholder_ids,
            shared_vocab=shared_vocab,
            filler=filler if others and not mine else None,
        )
        for group, mine, others in zip(groups, see, somebody_sees, strict=True)
    ]


def count_loss_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """Loss tokens of one optimizer step over all ranks and micro-batches: the only denominator.

    Collective.
    """
    (total,) = distributed.all_reduce([sum(mb.num_loss_tokens for mb in micro_batches)])
    return int(total)


def collate(
    scored: Sequence[Scored],
    *,
    pad_id: int,
    domains: Sequence[str],
    placeholder_ids: Collection[int] = (),
    shared_vocab: int | None = None,
    filler: Prompt | None = None,
) -> MicroBatch:
    """One micro-batch; an empty `scored` gives a single fully masked row, so that its loss is a
    connected zero. A `filler` is one more, connected to the image encoder too.

    Example: prompt [5, 6], response [7, 8] -> input [5, 6, 7], labels [6, 7, 8], loss mask [0, 1,
    1].
    """
    num_loss_tokens = [_num_loss_tokens(r, placeholder_ids, shared_vocab) for r, _ in scored]
    B = max(1, len(scored) + (filler is not None))
    S = max([_length(rollout) - 1 for rollout, _ in scored], default=1)
    S = max(S, len(filler.token_ids) if filler else 1)
    input_ids_BS, labels_BS = (torch.full((B, S), pad_id) for _ in range(2))
    attention_mask_BS, loss_mask_BS = (torch.zeros((B, S), dtype=torch.bool) for _ in range(2))
    rollout_logprobs_BS, old_logprobs_BS = (torch.zeros(B, S) for _ in range(2))
    for row, (rollout, _) in enumerate(scored):
        raw = torch.tensor(rollout.prompt.token_ids + rollout.response_ids)
        length, first = len(raw) - 1, len(rollout.prompt.token_ids) - 1
        end = first + num_loss_tokens[row]
        assert first >= 0, f"prompt {rollout.prompt.prompt_id}: an empty prompt"
        input_ids_BS[row, :length] = raw[:-1]
        labels_BS[row, :length] = raw[1:]
        attention_mask_BS[row, :length] = True
        loss_mask_BS[row, first:end] = True
        if rollout.rollout_logprobs is not None:
            logprobs_L = torch.tensor(rollout.rollout_logprobs)
            rollout_logprobs_BS[row, first:end] = logprobs_L[: end - first]
        if rollout.old_policy is not None:
            logprobs_L = torch.tensor(rollout.old_policy.logprobs)
            old_logprobs_BS[row, first:end] = logprobs_L[: end - first]
    if filler is not None:
        input_ids_BS[-1, : len(filler.token_ids)] = torch.tensor(filler.token_ids)
        attention_mask_BS[-1, : len(filler.token_ids)] = True
    elif not scored:
        attention_mask_BS[:, 0] = True  # attention over nothing is not defined
    has_old = all(r.old_policy is not None for r, _ in scored)  # a filler row: of its no tokens
    images = [rollout.prompt.images for rollout, _ in scored]
    images += [filler.images] if filler else []
    return MicroBatch(
        input_ids_BS=input_ids_BS,
        labels_BS=labels_BS,
        attention_mask_BS=attention_mask_BS,
        loss_mask_BS=loss_mask_BS,
        rollout_logprobs_BS=rollout_logprobs_BS,
        old_logprobs_BS=old_logprobs_BS if has_old else None,
        task_advantages_B=_per_row([r.task_advantage for r, _ in scored], B, 0.0, torch.float32),
        domain_ids_B=_per_row(
            [domains.index(r.prompt.domain) for r, _ in scored], B, -1, torch.long
        ),
        on_policy_B=_per_row([r.source == "student" for r, _ in scored], B, False, torch.bool),
        teacher_slices=_teacher_slices(scored, num_loss_tokens),
        images=tuple(images) if any(images) else (),
    )


def _num_loss_tokens(
    rollout: Rollout, placeholder_ids: Collection[int], shared_vocab: int | None
) -> int:
    """All of the response but for a last token that nobody should learn.

    A response ends at the placeholder of an image. One that the student wrote is a loss token: it
    would else find out that behind it nothing is judged, and a policy gradient has led it there
    within 80 steps. One that others wrote is none. A token that teachers do not have has no place
    in the loss.
    """
    last = rollout.response_ids[-1]
    copied = last in placeholder_ids and rollout.source != "student"
    return len(rollout.response_ids) - (copied or last >= (shared_vocab or math.inf))


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.response_ids)


def _per_row(values: list, rows: int, of_filler, dtype: torch.dtype) -> Tensor:
    return torch.tensor([*values, *[of_filler] * (rows - len(values))], dtype=dtype)


def _computed(lengths: Sequence[int], packed: bool) -> int:
    """What a micro-batch computes."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def _cut_by_tokens(scored: list[Scored], max_tokens: int, packed: bool) -> list[list[Scored]]:
    """Runs of neighbours of at most `max_tokens` each: of all such cuts, the one that costs least.

    A greedy cut has the fewest runs, since a part of a run that fits fits too, but it fills short
    rows up with long ones. 8 rows of 10 tokens and 2 of 100 fit 1,000 tokens in one piece; cut in
    two, they are 280.
    """
    lengths = [_length(rollout) - 1 for rollout, _ in scored]
    # of the first 0, 1, 2, ... rows: (tokens to compute and fixed costs, where the last run starts)
    best = [(0.0, 0)]
    for end, length in enumerate(lengths, 1):
        if length > max_tokens:
            raise ValueError(
                f"--max_tokens_per_micro_batch {max_tokens}: prompt "
                f"{scored[end - 1][0].prompt.prompt_id} and its response need {length}; give at "
                "least that, or lower --max_prompt_tokens or --max_response_tokens"
            )
        options, widest, total = [], 0, 0
        for start in range(end - 1, -1, -1):
            widest, total = max(widest, lengths[start]), total + lengths[start]
            tokens = total if packed else widest * (end - start)
            if tokens > max_tokens:
                break
            options.append((best[start][0] + tokens + FIXED_COST * max_tokens, start))
        best.append(min(options))
    runs, end = [], len(scored)
    while end > 0:
        start = best[end][1]
        runs.append(scored[start:end])
        end = start
    return runs[::-1]


def _teacher_slices(
    scored: Sequence[Scored], num_loss_tokens: Sequence[int]
) -> tuple[TeacherSlice, ...]:
    """Groups the rows' scores by teacher and by what the teacher gave: a cache that is full gives
    less for some rows.

    Row by row, the loss tokens are the responses, one after the other.
    """
    parts: dict[tuple[str, ...], list[tuple[Tensor, TeacherScores]]] = {}
    offset = 0
    for (rollout, row_scores), N in zip(scored, num_loss_tokens, strict=True):
        L = len(rollout.response_ids)
        if not row_scores:
            raise ValueError(
                f"prompt {rollout.prompt.prompt_id} ({rollout.prompt.domain}): no teacher scored it"
            )
        for score in row_scores:
            _check_aligned(score, L, rollout)
            given = tuple(name for name in PAYLOAD if getattr(score, name) is not None)
            parts.setdefault((score.teacher, *given), []).append(
                (torch.arange(offset, offset + N), score)
            )
        offset += N
    return tuple(
        TeacherSlice(
            teacher=teacher,
            token_index_M=_host_cat([index for index, _ in entries]),
            weights_M=_host_cat(
                [torch.full((len(index),), score.weight) for index, score in entries]
            ),
            **{
                PAYLOAD[name]: _host_cat(
                    [getattr(score, name)[: len(index)] for index, score in entries]
                )
                if name in given
                else None
                for name in PAYLOAD
            },
        )
        for (teacher, *given), entries in parts.items()
    )


def _host_cat(values: list[Tensor]) -> Tensor:
    """Joined along the first axis, in page-locked memory where there is a GPU: its copy from there
    blocks nobody.
    """
    if not torch.cuda.is_available():
        return torch.cat(values)
    shape = (sum(len(value) for value in values), *values[0].shape[1:])
    return torch.cat(values, out=torch.empty(shape, dtype=values[0].dtype, pin_memory=True))


def _check_aligned(score: TeacherScores, L: int, rollout: Rollout) -> None:
    for name in PAYLOAD:
        value = getattr(score, name)
        assert value is None or len(value) == L, (
            f"prompt {rollout.prompt.prompt_id}: {score.teacher}.{name} has {len(value)} rows for "
            f"{L} response tokens"
        )
