"""Rollouts to micro-batches and back: nothing is lost, nothing stands one place off, nothing is
written to.

B sequences, S padded length, L response length, N loss tokens, M loss tokens of one teacher, K
support, H hidden size.
"""

import dataclasses
import itertools
import random

import pytest
import torch

from opd import distributed
from opd.padding import FIXED_COST, PAYLOAD, collate, count_loss_tokens, make_micro_batches
from opd.types import MicroBatch, Prompt, Rollout, TeacherScores

DOMAINS = ["addition", "reversal", "both"]
MIXTURES = {"addition": [("A", 1.0)], "reversal": [("B", 1.0)], "both": [("A", 0.3), ("B", 0.7)]}
HIDDEN = {"A": 5, "B": 3}  # teachers of different sizes
PAD, K = 39, 2


def make_rollout(
    rng: random.Random, prompt_id: int, domain: str, source: str = "student"
) -> Rollout:
    response_ids = [rng.randrange(40) for _ in range(rng.randint(1, 9))]
    logprobs = [-rng.uniform(0.1, 5.0) for _ in response_ids] if source == "student" else None
    return Rollout(
        sample_id=f"0/{prompt_id}/0",
        prompt=Prompt(
            prompt_id=prompt_id,
            domain=domain,
            token_ids=[rng.randrange(40) for _ in range(rng.randint(1, 7))],
        ),
        source=source,
        response_ids=response_ids,
        rollout_logprobs=logprobs,
        finish_reason="stop",
        policy_version=rng.randrange(9),
        task_advantage=rng.uniform(-1, 1),
    )


def mark(prompt_id: int, t: int, teacher: str) -> float:
    """A number that says which token of which response a teacher's score belongs to; exact in
    float32.
    """
    return prompt_id * 100 + t * 10 + "AB".index(teacher)


def make_scores(rollout: Rollout) -> tuple[TeacherScores, ...]:
    scores = []
    for teacher, weight in MIXTURES[rollout.prompt.domain]:
        marks_L = torch.tensor(
            [mark(rollout.prompt.prompt_id, t, teacher) for t in range(len(rollout.response_ids))]
        )
        scores.append(
            TeacherScores(
                teacher=teacher,
                weight=weight,
                sampled_logprobs=marks_L,
                entropy=marks_L + 0.25,
                logsumexp=marks_L + 0.5,
                topk_ids=marks_L.long()[:, None] + torch.arange(K),
                topk_logprobs=marks_L[:, None] + torch.arange(K) / 4,
                hidden=marks_L[:, None].repeat(1, HIDDEN[teacher]),
            )
        )
    return tuple(scores)


def random_batch(seed: int, count: int = 7):
    rng = random.Random(seed)
    sources = ("student", "student", "dataset", "teacher")
    rollouts = [
        make_rollout(rng, i, rng.choice(DOMAINS), rng.choice(sources)) for i in range(count)
    ]
    rng.shuffle(rollouts)
    return rollouts, [make_scores(r) for r in rollouts]


def batches_of(rollouts, scores, size: int, **options) -> list[MicroBatch]:
    return make_micro_batches(
        rollouts, scores, micro_batch_size=size, pad_id=PAD, domains=DOMAINS, **options
    )


def rows_of(mb: MicroBatch) -> list[dict]:
    """Every row back from the tensors alone.

    A row's raw sequence is its first input and then its labels.
    """
    rows = []
    for b in range(len(mb.input_ids_BS)):
        length, mask_S = int(mb.attention_mask_BS[b].sum()), mb.loss_mask_BS[b]
        assert mb.attention_mask_BS[b, :length].all(), "padding is on the right"
        assert torch.equal(mb.input_ids_BS[b, 1:length], mb.labels_BS[b, : length - 1]), (
            "a label is the next input"
        )
        assert (mb.input_ids_BS[b, length:] == PAD).all() and (
            mb.labels_BS[b, length:] == PAD
        ).all()
        assert not mask_S[length:].any()
        assert (mb.rollout_logprobs_BS[b, ~mask_S] == 0).all()
        raw = [int(mb.input_ids_BS[b, 0]), *mb.labels_BS[b, :length].tolist()]
        response = mb.labels_BS[b, mask_S].tolist()
        rows.append(
            {
                "prompt": raw[: len(raw) - len(response)],
                "response": response,
                "raw": raw,
                "logprobs": mb.rollout_logprobs_BS[b, mask_S],
                "advantage": float(mb.task_advantages_B[b]),
                "domain": int(mb.domain_ids_B[b]),
                "on_policy": bool(mb.on_policy_B[b]),
            }
        )
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_round_trip(seed):
    rollouts, scores = random_batch(seed)
    micro_batches = batches_of(rollouts, scores, size=1 + seed % 5)
    rows = [row for mb in micro_batches for row in rows_of(mb)]
    assert len(rows) == len(rollouts)
    for rollout in rollouts:
        raw = rollout.prompt.token_ids + rollout.response_ids
        (row,) = [
            row for row in rows if row["raw"] == raw and row["prompt"] == rollout.prompt.token_ids
        ]
        assert row["response"] == rollout.response_ids
        logprobs = rollout.rollout_logprobs or [0.0] * len(rollout.response_ids)
        assert torch.equal(row["logprobs"], torch.tensor(logprobs))
        assert row["advantage"] == pytest.approx(rollout.task_advantage)
        assert row["domain"] == DOMAINS.index(rollout.prompt.domain)
        assert row["on_policy"] == (rollout.source == "student")


def test_the_worked_example():
    """Prompt [5, 6], response [7, 8]: the state of 6 predicts 7, the state of 7 predicts 8."""
    rollout = Rollout(
        sample_id="0/0/0",
        prompt=Prompt(prompt_id=0, domain="addition", token_ids=[5, 6]),
        source="student",
        response_ids=[7, 8],
        rollout_logprobs=[-0.5, -0.25],
        finish_reason="length",
        policy_version=3,
    )
    mb = collate([(rollout, make_scores(rollout))], pad_id=PAD, domains=DOMAINS)
    assert mb.input_ids_BS.tolist() == [[5, 6, 7]]
    assert mb.labels_BS.tolist() == [[6, 7, 8]]
    assert mb.loss_mask_BS.tolist() == [[False, True, True]]
    assert mb.rollout_logprobs_BS.tolist() == [[0.0, -0.5, -0.25]]
    assert mb.at_loss_tokens(mb.labels_BS).tolist() == [7, 8]


@pytest.mark.parametrize("seed", range(20))
def test_counts(seed):
    rollouts, scores = random_batch(seed)
    micro_batches = batches_of(rollouts, scores, size=1 + seed % 4)
    expected = sum(len(r.response_ids) for r in rollouts)
    assert (
        count_loss_tokens(micro_batches)
        == sum(mb.num_loss_tokens for mb in micro_batches)
        == expected
    )
    assert len(micro_batches) == -(-len(rollouts) // (1 + seed % 4))


@pytest.mark.parametrize("seed", range(20))
def test_teacher_slices_point_at_their_tokens(seed):
    """Row by row through the loss tokens, a slice holds the marks of exactly the responses that its
    teacher scored.
    """
    rollouts, scores = random_batch(seed)
    by_raw = {tuple(r.prompt.token_ids + r.response_ids): r for r in rollouts}
    for mb in batches_of(rollouts, scores, size=3):
        in_order = [by_raw[tuple(row["raw"])] for row in rows_of(mb)]
        # row-major, as the loss mask
        tokens_N = [(r, t) for r in in_order for t in range(len(r.response_ids))]
        assert [r.response_ids[t] for r, t in tokens_N] == mb.at_loss_tokens(mb.labels_BS).tolist()
        covered = torch.zeros(len(tokens_N))
        for part in mb.teacher_slices:
            expected = [
                (
                    n,
                    mark(r.prompt.prompt_id, t, part.teacher),
                    dict(MIXTURES[r.prompt.domain])[part.teacher],
                )
                for n, (r, t) in enumerate(tokens_N)
                if part.teacher in dict(MIXTURES[r.prompt.domain])
            ]
            index, marks, weights = map(list, zip(*expected, strict=True))
            marks_M = torch.tensor(marks)
            assert part.token_index_M.tolist() == index  # complete and ascending
            assert torch.equal(part.weights_M, torch.tensor(weights))
            assert torch.equal(part.sampled_logprobs_M, marks_M)
            assert torch.equal(part.entropy_M, marks_M + 0.25)
            assert torch.equal(part.logsumexp_M, marks_M + 0.5)
            assert torch.equal(part.topk_ids_MK, marks_M.long()[:, None] + torch.arange(K))
            assert torch.equal(part.topk_logprobs_MK, marks_M[:, None] + torch.arange(K) / 4)
            assert torch.equal(part.hidden_MH, marks_M[:, None].expand(-1, HIDDEN[part.teacher]))
            covered.index_add_(0, part.token_index_M, part.weights_M)
        assert torch.allclose(covered, torch.ones_like(covered)), (
            "the weights of each token sum to 1"
        )


def test_one_teacher_at_a_time_and_little_padding():
    """Rollouts of one teacher come together, shortest first: its head is fetched once and rows are
    of like length.
    """
    rollouts, scores = random_batch(3, count=12)
    order = [row for mb in batches_of(rollouts, scores, size=1) for row in rows_of(mb)]
    keys = [
        ([name for name, _ in MIXTURES[DOMAINS[row["domain"]]]], len(row["raw"])) for row in order
    ]
    assert keys == sorted(keys)


# ---- Micro-batches by tokens ---------------------------------------------------------------------


def of_lengths(lengths: list[int], domains: list[str] | None = None):
    """Rollouts that take `lengths` tokens after the shift: a prompt of one token and a response of
    that length.
    """
    rollouts = [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain=domain, token_ids=[i]),
            source="dataset",
            response_ids=[2] * length,
            rollout_logprobs=None,
            finish_reason="stop",
            policy_version=0,
        )
        for i, (length, domain) in enumerate(
            zip(lengths, domains or ["addition"] * len(lengths), strict=True)
        )
    ]
    return rollouts, [make_scores(r) for r in rollouts]


def lengths_of(micro_batches: list[MicroBatch]) -> list[list[int]]:
    return [mb.attention_mask_BS.sum(1).tolist() for mb in micro_batches]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "packed", "expected"),
    [
        ([5, 5, 5, 5], 10, False, [[5, 5], [5, 5]]),
        ([5, 5, 5, 5], 9, False, [[5], [5], [5], [5]]),
        ([5, 5, 5, 5], 20, False, [[5, 5, 5, 5]]),
        ([3, 1, 2], 100, False, [[1, 2, 3]]),
        (
            [3, 1, 2],
            6,
            False,
            [[1], [2, 3]],
        ),  # 2 runs either way; [1, 2], [3] pads one token as well
        ([10], 10, False, [[10]]),
        ([], 10, False, []),
        # Greedy would take 8 x 10 and 2 x 100 together, which is just 1,000.
        ([100] * 8 + [10] * 8, 1000, False, [[10] * 8, [100] * 8]),
        # All fit into one, but as wide as the widest: 280 tokens and one more micro-batch are less
        # than 1,000.
        ([100] * 2 + [10] * 8, 1000, False, [[10] * 8, [100] * 2]),
        (
            [100] * 2 + [70] * 8,
            1000,
            False,
            [[70] * 8 + [100] * 2],
        ),  # 240 tokens of padding are worth less than that
        ([1, 1, 1, 9], 10, False, [[1, 1, 1], [9]]),
        ([1, 1, 1, 9], 12, True, [[1, 1, 1, 9]]),  # the same rows, packed: 12 tokens and no padding
        ([1, 1, 1, 9], 11, True, [[1], [1, 1, 9]]),
        ([4, 4, 4], 8, True, [[4], [4, 4]]),
    ],
)
def test_cut_by_tokens(lengths, max_tokens, packed, expected):
    rollouts, scores = of_lengths(lengths)
    found = batches_of(rollouts, scores, size=1, max_tokens=max_tokens, packed=packed)
    assert lengths_of(found) == expected


def every_cut(items: list):
    """All ways to cut a list into runs."""
    for marks in itertools.product([False, True], repeat=max(0, len(items) - 1)):
        runs = [items[:1]]
        for item, new in zip(items[1:], marks, strict=True):
            if new:
                runs.append([])
            runs[-1].append(item)
        yield runs if items else []


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("packed", [False, True])
def test_the_cut_by_tokens_is_the_best_there_is(seed, packed):
    """Against all cuts of the order: within the budget, nothing lost, and none costs less."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 9))]
    domains = [rng.choice(DOMAINS) for _ in lengths]
    max_tokens = rng.randint(max(lengths), 3 * max(lengths))
    rollouts, scores = of_lengths(lengths, domains)
    found = batches_of(rollouts, scores, size=1, max_tokens=max_tokens, packed=packed)
    whole = batches_of(rollouts, scores, size=len(rollouts))
    rows = [row["raw"] for mb in found for row in rows_of(mb)]
    assert rows == [row["raw"] for row in rows_of(whole[0])], (
        "every rollout once, in the order of a cut by sequences"
    )

    def cost(run: list[int]) -> int:
        return sum(run) if packed else len(run) * max(run)

    cuts = [
        cut
        for cut in every_cut(lengths_of(whole)[0])
        if all(cost(run) <= max_tokens for run in cut)
    ]
    mine = lengths_of(found)
    assert all(cost(run) <= max_tokens for run in mine)
    fixed = FIXED_COST * max_tokens
    assert sum(cost(run) + fixed for run in mine) == pytest.approx(
        min(sum(cost(r) + fixed for r in c) for c in cuts)
    )
    if packed:
        assert len(mine) == min(map(len, cuts))


def test_a_rollout_over_the_budget_names_the_flag():
    rollouts, scores = of_lengths([3, 12, 5])
    message = r"--max_tokens_per_micro_batch 11: prompt 1 and its response need 12; .*--max_response_tokens"  # noqa: E501
    for packed in (False, True):
        with pytest.raises(ValueError, match=message):
            batches_of(rollouts, scores, size=8, max_tokens=11, packed=packed)
        assert len(batches_of(rollouts, scores, size=8, max_tokens=12, packed=packed)) == 2


@pytest.mark.parametrize("own", [0, 1, 5])
def test_a_cut_by_tokens_is_filled_up_as_well(own, monkeypatch):
    monkeypatch.setattr(
        distributed,
        "all_reduce",
        lambda values, op="sum": [max(4, *values)] if op == "max" else values,
    )
    rollouts, scores = of_lengths([10] * own)
    micro_batches = batches_of(rollouts, scores, size=1, max_tokens=20)
    full = -(-own // 2)
    assert [mb.num_loss_tokens > 0 for mb in micro_batches] == [True] * full + [False] * (4 - full)


@pytest.mark.parametrize(
    ("options", "alone", "beside_others"),
    [
        ({"size": 2}, [[1, 2], [3, 4], [5, 9], [7]], [[5, 9], [3, 4], [7], [1, 2]]),
        (
            {"size": 1, "max_tokens": 8, "packed": True},
            [[1, 2], [3, 4], [5], [7]],
            [[3, 4], [7], [5], [1, 2]],
        ),
    ],
)
def test_the_largest_comes_first_beside_other_ranks(options, alone, beside_others, monkeypatch):
    """What all ranks compute at the same time is about as large; a single rank goes by teacher."""
    lengths = [1, 2, 3, 4, 5, 9, 7] if "max_tokens" not in options else [1, 2, 3, 4, 5, 7]
    domains = ["addition"] * (len(lengths) - 1) + ["reversal"]
    rollouts, scores = of_lengths(lengths, domains)
    assert lengths_of(batches_of(rollouts, scores, **options)) == alone
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda values, op="sum": values)
    assert lengths_of(batches_of(rollouts, scores, **options)) == beside_others


# ---- Order, fillers, mistakes --------------------------------------------------------------------


def test_the_order_of_the_rollouts_changes_nothing():
    rollouts, scores = random_batch(5)
    one = batches_of(rollouts, scores, size=2)
    two = batches_of(rollouts[::-1], scores[::-1], size=2)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.input_ids_BS, b.input_ids_BS)
        assert torch.equal(a.loss_mask_BS, b.loss_mask_BS)


def test_a_filler_row_is_masked_but_can_be_computed():
    mb = collate([], pad_id=PAD, domains=DOMAINS)
    assert mb.input_ids_BS.shape == (1, 1) and mb.num_loss_tokens == 0
    assert mb.attention_mask_BS.any(dim=1).all(), "attention over nothing is not defined"
    assert mb.domain_ids_B.tolist() == [-1] and mb.on_policy_B.tolist() == [False]
    assert mb.teacher_slices == ()
    assert mb.at_loss_tokens(mb.labels_BS).shape == (0,)


@pytest.mark.parametrize("own", [0, 1, 5])
def test_a_rank_with_fewer_rollouts_gets_fillers(own, monkeypatch):
    """Another rank has 4 micro-batches; two real ranks stand in test_distributed.py."""
    monkeypatch.setattr(
        distributed,
        "all_reduce",
        lambda values, op="sum": [max(4, *values)] if op == "max" else values,
    )
    rollouts, scores = random_batch(1, count=own)
    micro_batches = batches_of(rollouts, scores, size=2)
    full = -(-own // 2)
    assert len(micro_batches) == 4
    assert [mb.num_loss_tokens > 0 for mb in micro_batches] == [True] * full + [False] * (4 - full)


def test_a_micro_batch_moves_as_a_whole():
    (mb,) = batches_of(*random_batch(6), size=7)
    assert len(mb.teacher_slices) == 2
    moved = mb.to(torch.device("meta"))
    for before, after in ((mb, moved), *zip(mb.teacher_slices, moved.teacher_slices, strict=True)):
        for name in before.__slots__:
            value = getattr(before, name)
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cpu" and getattr(after, name).is_meta, name
                assert getattr(after, name).shape == value.shape
    back = mb.to(torch.device("cpu"))
    assert (
        torch.equal(back.labels_BS, mb.labels_BS)
        and back.teacher_slices[1].teacher == mb.teacher_slices[1].teacher
    )


def test_missing_scores_are_refused():
    rollouts, scores = random_batch(2)
    scores[3] = ()
    with pytest.raises(
        ValueError, match=rf"prompt {rollouts[3].prompt.prompt_id} .*no teacher scored it"
    ):
        batches_of(rollouts, scores, size=2)


def test_rollouts_and_scores_come_in_pairs():
    rollouts, scores = random_batch(2)
    with pytest.raises(ValueError, match="shorter"):
        batches_of(rollouts, scores[:-1], size=2)


def test_scores_of_another_length_are_refused():
    rollout = make_rollout(random.Random(0), 0, "addition")
    longer = make_scores(
        Rollout(
            sample_id=rollout.sample_id,
            prompt=rollout.prompt,
            source="dataset",
            response_ids=[*rollout.response_ids, 1],
            rollout_logprobs=None,
            finish_reason="stop",
            policy_version=0,
        )
    )
    with pytest.raises(
        AssertionError, match=r"A\.sampled_logprobs has \d+ rows for \d+ response tokens"
    ):
        collate([(rollout, longer)], pad_id=PAD, domains=DOMAINS)


def test_a_payload_that_was_not_asked_for_stays_none():
    rollout = make_rollout(random.Random(0), 0, "addition")
    scores = (
        TeacherScores(teacher="A", weight=1.0, hidden=torch.zeros(len(rollout.response_ids), 5)),
    )
    (part,) = collate([(rollout, scores)], pad_id=PAD, domains=DOMAINS).teacher_slices
    assert torch.equal(part.hidden_MH, scores[0].hidden)
    assert part.sampled_logprobs_M is part.entropy_M is part.logsumexp_M is None
    assert part.topk_ids_MK is part.topk_logprobs_MK is None


def test_a_teacher_may_give_more_for_some_rollouts_than_for_others():
    """A cache that is full keeps hidden states of some responses and the top-k of others: one slice
    for each kind.
    """
    rng = random.Random(0)
    rollouts = [make_rollout(rng, i, "addition") for i in range(4)]
    scored = []
    for index, rollout in enumerate(rollouts):
        (whole,) = make_scores(rollout)
        dropped = (
            ("topk_ids", "topk_logprobs", "logsumexp") if index in (0, 2) else ("hidden", "entropy")
        )
        scored.append((rollout, (dataclasses.replace(whole, **dict.fromkeys(dropped)),)))
    mb = collate(scored, pad_id=PAD, domains=DOMAINS)
    hidden, topk = mb.teacher_slices
    assert hidden.teacher == topk.teacher == "A"
    assert hidden.topk_ids_MK is hidden.topk_logprobs_MK is hidden.logsumexp_M is None
    assert topk.hidden_MH is topk.entropy_M is None
    lengths = [len(r.response_ids) for r in rollouts]
    marks_N = torch.tensor(
        [mark(r.prompt.prompt_id, t, "A") for r in rollouts for t in range(len(r.response_ids))]
    )
    owner_N = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    assert hidden.token_index_M.tolist() == (owner_N % 2 == 0).nonzero().flatten().tolist()
    assert topk.token_index_M.tolist() == (owner_N % 2 == 1).nonzero().flatten().tolist()
    assert torch.equal(hidden.hidden_MH[:, 0], marks_N[hidden.token_index_M])
    assert torch.equal(topk.topk_logprobs_MK[:, 0], marks_N[topk.token_index_M])
    assert torch.equal(topk.logsumexp_M, marks_N[topk.token_index_M] + 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_what_teachers_said_waits_in_page_locked_memory():
    (mb,) = batches_of(*random_batch(6), size=7)
    tensors = [
        value
        for part in mb.teacher_slices
        for n in part.__slots__
        if torch.is_tensor(value := getattr(part, n))
    ]
    assert len(tensors) == 16 and all(tensor.is_pinned() for tensor in tensors)
    moved = mb.to(torch.device("cuda"))
    torch.cuda.synchronize()
    for part, on_gpu in zip(mb.teacher_slices, moved.teacher_slices, strict=True):
        assert torch.equal(part.hidden_MH, on_gpu.hidden_MH.cpu())


def test_nothing_is_written_to_the_arguments():
    rollouts, scores = random_batch(4)
    tokens = [
        (
            list(r.prompt.token_ids),
            list(r.response_ids),
            r.rollout_logprobs and list(r.rollout_logprobs),
        )
        for r in rollouts
    ]
    tensors = [
        (tensor, tensor._version, tensor.clone())
        for row in scores
        for score in row
        for tensor in (getattr(score, name) for name in PAYLOAD)
    ]
    order = list(rollouts)
    batches_of(rollouts, scores, size=3)
    assert rollouts == order
    assert tokens == [(r.prompt.token_ids, r.response_ids, r.rollout_logprobs) for r in rollouts]
    for tensor, version, copy in tensors:
        assert tensor._version == version and torch.equal(tensor, copy)
