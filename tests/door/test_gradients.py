"""One optimizer step of the real student under DeepSpeed against plain autograd on the whole batch.

Whatever the padding, the order, the micro-batches, the chunks, the ranks and the ZeRO stage: the
same loss, the same gradient norm, the same change of every parameter. Each case is compared with
the same reference, so all are equal.

L response length, V vocabulary.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.processes import ROOT
from tests.support.ranks import run_ranks
from tests.support.workers.gradient_worker import (
    ADAM_EPS,
    LEARNING_RATE,
    LOSSES,
    Case,
    heads,
    make_batch,
)

WORKER = ROOT / "tests" / "support" / "workers" / "gradient_worker.py"
DEADLINE = 300  # seconds for all cases of one launch
TOLERANCE = 1e-6  # of the largest entry
# In bfloat16, of the length of all: 2^-9 = .002 is one rounding, and a gradient has gone through
# ten of them. Measured: .006 between cuts under stages 1 and 2, .022 between stages 2 and 3, .023
# from float32. That sums over micro-batches add nothing to it: tests/engines/test_accumulation.py.
BFLOAT16_TOLERANCE = 0.03

ONE_RANK = (
    Case(name="whole"),
    Case(name="one_by_one", micro_batch_size=1),
    Case(name="threes_padded_with_17", micro_batch_size=3, pad_id=17),
    Case(name="shuffled", micro_batch_size=3, order=1),
    Case(name="shuffled_again", micro_batch_size=2, order=2, pad_id=5),
    Case(name="chunks_of_5", chunk_tokens=5),
    Case(name="recomputed", micro_batch_size=3, gradient_checkpointing=True),
    Case(name="clipped", micro_batch_size=3, max_grad_norm=0.1),
    Case(name="zero1", stage=1, micro_batch_size=3),
    Case(name="zero2", stage=2, micro_batch_size=3, chunk_tokens=7),
    Case(name="zero3", stage=3, micro_batch_size=3, chunk_tokens=7),
    Case(name="packed", micro_batch_size=3, packing=True, chunk_tokens=5),
    Case(name="packed_whole", packing=True),
    Case(
        name="zero3_packed_recomputed",
        stage=3,
        micro_batch_size=3,
        packing=True,
        gradient_checkpointing=True,
    ),
    Case(name="zero3_recomputed", stage=3, micro_batch_size=2, gradient_checkpointing=True),
    Case(name="tied", model="tied", micro_batch_size=3),
    Case(name="zero2_tied", stage=2, model="tied", micro_batch_size=3),
    Case(name="zero3_tied", stage=3, model="tied", micro_batch_size=3),
    Case(name="task", loss="task", micro_batch_size=3, chunk_tokens=5),
    Case(name="pg", loss="pg", micro_batch_size=3, chunk_tokens=5),
    Case(name="zero3_pg", stage=3, loss="pg", micro_batch_size=2, order=3),
)
TWO_RANKS = (
    Case(name="whole"),
    Case(name="shuffled", micro_batch_size=2, order=4, chunk_tokens=5),
    Case(name="filler", deal=(5, 3), micro_batch_size=2, pad_id=9),
    Case(name="only_fillers", deal=(8, 0), micro_batch_size=3),
    Case(name="zero1", stage=1, micro_batch_size=3),
    Case(name="zero2", stage=2, micro_batch_size=1, order=5),
    Case(name="zero2_filler", stage=2, deal=(3, 5), micro_batch_size=1),
    Case(name="zero2_only_fillers", stage=2, deal=(0, 8), micro_batch_size=3),
    Case(name="zero3", stage=3, micro_batch_size=3),
    Case(name="zero3_filler", stage=3, deal=(7, 1), micro_batch_size=2, chunk_tokens=3),
    Case(
        name="zero3_only_fillers",
        stage=3,
        deal=(8, 0),
        micro_batch_size=3,
        gradient_checkpointing=True,
    ),
    Case(name="zero3_packed_only_fillers", stage=3, deal=(8, 0), micro_batch_size=3, packing=True),
    Case(name="zero3_clipped", stage=3, micro_batch_size=3, max_grad_norm=0.1),
    Case(name="tied", model="tied", micro_batch_size=3),
    Case(name="zero2_tied", stage=2, model="tied", micro_batch_size=3),
    Case(name="zero3_tied", stage=3, model="tied", deal=(5, 3), micro_batch_size=2),
    Case(name="zero2_task", stage=2, loss="task", micro_batch_size=3),
    Case(name="pg", loss="pg", micro_batch_size=3),
    Case(name="balanced", deal=(7, 1), micro_batch_size=3, balanced=True),
    Case(name="zero3_balanced", stage=3, deal=(1, 7), micro_batch_size=2, balanced=True),
    Case(
        name="zero3_pg_filler", stage=3, loss="pg", deal=(3, 5), micro_batch_size=2, chunk_tokens=3
    ),
)
BFLOAT16 = (
    Case(name="bf16_whole", stage=2, dtype="bfloat16"),
    Case(name="bf16_one_by_one", stage=2, micro_batch_size=1, dtype="bfloat16"),
    Case(name="bf16_zero1", stage=1, micro_batch_size=1, dtype="bfloat16"),
    Case(name="bf16_zero3", stage=3, micro_batch_size=1, dtype="bfloat16"),
    Case(name="bf16_by_tokens", stage=3, max_tokens=40, dtype="bfloat16"),
    Case(name="bf16_packed", stage=3, micro_batch_size=3, packing=True, dtype="bfloat16"),
)
BFLOAT16_TWO_RANKS = (
    Case(name="bf16_two_ranks", stage=3, micro_batch_size=2, dtype="bfloat16"),
    Case(
        name="bf16_balanced",
        stage=3,
        deal=(1, 7),
        micro_batch_size=1,
        balanced=True,
        dtype="bfloat16",
    ),
    Case(name="bf16_balanced_zero1", stage=1, deal=(7, 1), balanced=True, dtype="bfloat16"),
)
REFRESHED = (
    Case(name="refreshed_ppo", loss="ppo", micro_batch_size=3, inner_updates=2, learning_rate=0.02),
    Case(name="refreshed_pg", loss="pg", micro_batch_size=3, inner_updates=3, learning_rate=0.02),
    Case(
        name="refreshed_decoupled",
        loss="decoupled",
        micro_batch_size=3,
        inner_updates=3,
        learning_rate=0.02,
        stage=3,
    ),
    Case(name="refreshed_full", micro_batch_size=3, inner_updates=3, learning_rate=0.02, stage=3),
)


# ---- The reference: every response by itself, no padding, no shift, no chunks --------------------


@torch.no_grad()
def sampled_logprobs(model) -> list[torch.Tensor]:
    """log p(y) of each response's tokens, [L]."""
    found = []
    for rollout, _ in make_batch():
        raw, first = (
            torch.tensor([rollout.prompt.token_ids + rollout.response_ids]),
            len(rollout.prompt.token_ids),
        )
        s_LV = model(raw).logits[0, first - 1 : -1].log_softmax(-1)
        found.append(s_LV[torch.arange(len(s_LV)), torch.tensor(rollout.response_ids)])
    return found


def decoupled_weights(old_L, sampler_L, cfg) -> torch.Tensor:
    """Old policy over sampler, cut; all 0 where its geometric mean leaves the bounds."""
    ratio_L = (old_L - sampler_L).exp()
    inside = cfg.reject_low <= ratio_L.log().mean().exp() <= cfg.reject_high
    return ratio_L.clamp(max=cfg.is_high) * float(inside)


def naive_loss(model, cfg, old=None) -> torch.Tensor:
    """The mean over all response tokens of the batch, from the definitions; `old` are the old
    policy's [L], if not sampler's.
    """
    losses, count = [], 0
    for i, (rollout, scores) in enumerate(make_batch()):
        raw, first = (
            torch.tensor([rollout.prompt.token_ids + rollout.response_ids]),
            len(rollout.prompt.token_ids),
        )
        s_LV = model(raw).logits[0, first - 1 : -1].log_softmax(-1)
        s_L = torch.stack([s_LV[t, token] for t, token in enumerate(rollout.response_ids)])
        t_LVs = [
            (score.weight, (score.hidden @ heads()[score.teacher].T).log_softmax(-1))
            for score in scores
        ]
        if cfg.loss == "reverse_kl_pg":
            t_L = sum(
                w * torch.stack([t_LV[t, y] for t, y in enumerate(rollout.response_ids)])
                for w, t_LV in t_LVs
            )
            if cfg.clip_low is not None:
                advantage_L = (t_L - s_L).detach() + cfg.reward_weight * rollout.task_advantage
                sampler_L = torch.tensor(rollout.rollout_logprobs)
                ratio_L = (s_L - (sampler_L if old is None else old[i])).exp()
                clipped_L = ratio_L.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
                weights_L = 1.0 if old is None else decoupled_weights(old[i], sampler_L, cfg)
                losses.append(
                    -(
                        weights_L * torch.minimum(advantage_L * ratio_L, advantage_L * clipped_L)
                    ).sum()
                )
                count += len(rollout.response_ids)
                continue
            ratio = (
                (s_L.detach() - torch.tensor(rollout.rollout_logprobs))
                .mean()
                .exp()
                .clamp(max=cfg.is_high)
            )
            advantage_L = (t_L - s_L).detach() + cfg.reward_weight * rollout.task_advantage
            loss_L = -ratio * advantage_L * s_L
        else:
            loss_L = sum(w * (s_LV.exp() * (s_LV - t_LV)).sum(-1) for w, t_LV in t_LVs)
            loss_L = loss_L - cfg.reward_weight * rollout.task_advantage * s_L
        losses.append(loss_L.sum())
        count += len(rollout.response_ids)
    return sum(losses) / count


@pytest.fixture(scope="module")
def models(tiny, tiny_tied):
    return {"student": str(tiny.student), "tied": str(tiny_tied)}


@pytest.fixture(scope="module")
def reference(models):
    """(loss, gradients by name) of a model and a loss, worked out once each."""
    known = {}

    def of(model: str, loss: str):
        if (model, loss) not in known:
            network = AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32)
            value = naive_loss(network, LOSSES[loss])
            value.backward()
            known[model, loss] = (
                value.item(),
                {name: p.grad for name, p in network.named_parameters()},
            )
        return known[model, loss]

    return of


# ---- The real thing ------------------------------------------------------------------------------


def launch(cases, models, out: Path, num_ranks: int) -> Path:
    """All cases in one process per rank: starting one costs more than a case."""
    job = out / "job.json"
    rows = [dataclasses.asdict(case) for case in cases]
    job.write_text(json.dumps({"models": models, "out": str(out), "cases": rows}))
    run_ranks(WORKER, str(job), num_ranks=num_ranks, timeout_s=DEADLINE)
    return out


@pytest.fixture(scope="module")
def one_rank(models, tmp_path_factory):
    return launch(
        (*ONE_RANK, *REFRESHED, *BFLOAT16), models, tmp_path_factory.mktemp("one_rank"), 1
    )


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    return launch(
        (
            *TWO_RANKS,
            *(dataclasses.replace(case, name=f"two_{case.name}") for case in REFRESHED),
            *BFLOAT16_TWO_RANKS,
        ),
        models,
        tmp_path_factory.mktemp("two_ranks"),
        2,
    )


def check(case: Case, out: Path, reference) -> dict:
    """Loss, gradient norm and the step of every parameter; returns what the worker recorded."""
    record = json.loads((out / f"{case.name}.json").read_text())
    loss, gradients = reference(case.model, case.loss)
    assert record["losses"] == pytest.approx([loss], rel=TOLERANCE, abs=TOLERANCE)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=TOLERANCE * 10)

    scale = min(1.0, case.max_grad_norm / norm) if case.max_grad_norm else 1.0
    assert (case.max_grad_norm > 0) == (scale < 1), "a clipped case clips"
    moved = load_file(out / f"{case.name}.safetensors")
    assert moved.keys() == gradients.keys()
    for name, gradient in gradients.items():
        gradient = gradient * scale
        expected = -LEARNING_RATE * gradient / (gradient.abs() + ADAM_EPS)
        largest = expected.abs().max().item()
        assert largest > 1e-4, f"{name}: too small a gradient says nothing"
        assert (moved[name] - expected).abs().max().item() < TOLERANCE * max(1.0, largest), name
    return record


@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
def test_one_rank(case, one_rank, reference):
    record = check(case, one_rank, reference)
    assert len(record["loss_tokens"][0]) == -(-8 // case.micro_batch_size)


@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.name)
def test_two_ranks(case, two_ranks, reference):
    record = check(case, two_ranks, reference)
    first, second = record["loss_tokens"]
    if case.balanced:  # each domain has two or three responses, so they come to four and four
        assert len(first) == len(second) == -(-4 // case.micro_batch_size)
        assert 0 not in first + second
        return
    most = max(case.deal or (4, 4))
    assert len(first) == len(second) == -(-most // case.micro_batch_size), (
        "every rank runs as many micro-batches"
    )
    assert (0 in first + second) == (case.deal is not None), "a filler where a rank has fewer"


@pytest.mark.parametrize("case", BFLOAT16 + BFLOAT16_TWO_RANKS, ids=lambda case: case.name)
def test_bfloat16(case, one_rank, two_ranks, reference):
    """The float32 masters move as one micro-batch on one rank moves them, whatever the cut."""
    out = two_ranks if case in BFLOAT16_TWO_RANKS else one_rank
    moved = load_file(out / f"{case.name}.safetensors")
    whole = load_file(one_rank / "bf16_whole.safetensors")
    loss, gradients = reference(case.model, case.loss)
    record = json.loads((out / f"{case.name}.json").read_text())
    expected = {n: -LEARNING_RATE * g / (g.abs() + ADAM_EPS) for n, g in gradients.items()}
    assert record["losses"] == pytest.approx([loss], rel=BFLOAT16_TOLERANCE)
    assert distance(moved, whole) < BFLOAT16_TOLERANCE
    assert distance(moved, expected) < BFLOAT16_TOLERANCE


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Length of the difference / length of what is expected."""
    assert found.keys() == expected.keys()
    difference = torch.stack([(found[n] - expected[n]).norm() for n in expected]).norm()
    return float(difference / torch.stack([e.norm() for e in expected.values()]).norm())


@pytest.mark.parametrize("case", REFRESHED, ids=lambda case: case.name)
def test_inner_updates_refresh_the_reward(case, one_rank, two_ranks, models):
    """Each update has the loss, advantage and importance weights of the student it finds, from
    scores that never change.
    """
    network = AutoModelForCausalLM.from_pretrained(models[case.model], dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=case.learning_rate, betas=(0.9, 0.95), eps=ADAM_EPS, weight_decay=0
    )
    losses, advantages = [], []
    decoupled = LOSSES[case.loss].old_logprobs == "recompute"
    old = sampled_logprobs(network) if decoupled else None
    for _ in range(case.inner_updates):
        advantages.append(mean_advantage(network))
        loss = naive_loss(network, LOSSES[case.loss], old)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len({round(a, 4) for a in advantages}) == case.inner_updates, (
        "the reward is another one after each update"
    )
    for stem in (one_rank / case.name, two_ranks / f"two_{case.name}"):
        record = json.loads(stem.with_suffix(".json").read_text())
        assert record["losses"] == pytest.approx(losses, rel=1e-5, abs=1e-5)
        assert record["advantages"] == pytest.approx(advantages, rel=1e-5)
        moved = load_file(stem.with_suffix(".safetensors"))
        for name, parameter in network.named_parameters():
            assert (moved[name] - (parameter.detach() - before[name])).abs().max() < 1e-5, name


@torch.no_grad()
def mean_advantage(model) -> float:
    """Mean over tokens of |sum_i w_i log q_i(y) - log p(y)|."""
    values = []
    for rollout, scores in make_batch():
        raw, first = (
            torch.tensor([rollout.prompt.token_ids + rollout.response_ids]),
            len(rollout.prompt.token_ids),
        )
        s_LV = model(raw).logits[0, first - 1 : -1].log_softmax(-1)
        for t, token in enumerate(rollout.response_ids):
            theirs = sum(
                score.weight * (score.hidden[t] @ heads()[score.teacher].T).log_softmax(-1)[token]
                for score in scores
            )
            values.append(abs(theirs - s_LV[t, token]).item())
    return sum(values) / len(values)
