"""Where a chunk of student logits meets its teachers, and the loss that train_mopd.py makes of it,
in float64.

Everything is compared with sums written out token by token in probabilities, not in logarithms as
the code does.

B sequences, S padded length, L response length, N loss tokens, C tokens of a chunk, K support, V
vocabulary, H hidden.
"""

import math
from dataclasses import replace

import pytest
import torch

from opd import distillation
from opd.config import LossConfig
from opd.distillation import compare, payload_of, support_of
from opd.losses import DIVERGENCES, TAILS
from opd.ops.heads import LogitForm, OutputHead
from opd.ops.logits import LogitsChunk
from opd.padding import collate
from opd.student import summarise
from opd.teachers import TeacherPool
from opd.types import TeacherSlice
from tests.support.batches import (
    CHUNKS,
    CPU,
    DOMAINS,
    HEADS,
    VOCAB,
    Batch,
    K,
    close,
    gradient,
    naive_divergence,
    naive_losses,
    randn,
    run_compare,
    run_token_loss,
    sampled_logprobs,
)
from train_mopd import token_loss

# ---- Divergences, written out --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_full_support(loss, temperature, chunk):
    cfg = LossConfig(
        loss=loss, support="full", jsd_beta=0.3, skew_alpha=0.2, loss_temperature=temperature
    )
    batch = Batch(temperature)
    actual, _ = run_compare(batch, cfg, chunk)
    expected = naive_losses(batch, cfg, lambda p, q, label: naive_divergence(p, q, cfg))
    close(actual, expected)
    close(gradient(actual, batch), gradient(expected, batch))
    assert (gradient(actual, batch)[:, VOCAB:] == 0).all(), "the padding has no part in it"


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_teacher_topk_support(loss, tail, temperature, chunk):
    cfg = LossConfig(
        loss=loss,
        support="teacher_topk",
        support_k=K,
        tail=tail,
        jsd_beta=0.3,
        skew_alpha=0.2,
        loss_temperature=temperature,
    )
    batch = Batch(temperature, "topk")
    actual, stats = run_compare(batch, cfg, chunk)

    def on_support(value):
        def of_teacher(p, q, label):
            ids_K = q.topk(K).indices
            return value(p[ids_K], q[ids_K])

        return naive_losses(batch, cfg, of_teacher)

    expected = on_support(lambda p, q: naive_divergence(p, q, cfg, tail))
    close(actual, expected)
    close(gradient(actual, batch), gradient(expected, batch))
    close(stats["distill/student_mass"], on_support(lambda p, q: p.sum()))
    close(stats["distill/teacher_mass"], on_support(lambda p, q: q.sum()))


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_union_topk_support(loss, tail, temperature, chunk):
    cfg = LossConfig(
        loss=loss,
        support="union_topk",
        support_k=K,
        tail=tail,
        jsd_beta=0.3,
        skew_alpha=0.2,
        loss_temperature=temperature,
    )
    batch = Batch(temperature, "topk+hidden")
    actual, stats = run_compare(batch, cfg, chunk)
    sizes = set()

    def on_support(value):
        def of_teacher(p, q, label):
            ids = sorted({*q.topk(K).indices.tolist(), *p.topk(K).indices.tolist()})
            sizes.add(len(ids))
            return value(p[ids], q[ids])

        return naive_losses(batch, cfg, of_teacher)

    expected = on_support(lambda p, q: naive_divergence(p, q, cfg, tail))
    assert len(sizes) > 1 and min(sizes) >= K, "the unions differ in size"
    close(actual, expected)
    close(gradient(actual, batch), gradient(expected, batch))
    close(stats["distill/student_mass"], on_support(lambda p, q: p.sum()))
    close(stats["distill/teacher_mass"], on_support(lambda p, q: q.sum()))


@pytest.mark.parametrize("support", ["full", "union_topk"])
def test_tokens_that_the_cache_spilled_use_the_teachers_top_k(support):
    cfg = LossConfig(support=support, support_k=K)
    kept, spilled = Batch(payload=payload_of(cfg)), Batch(payload="topk")
    mixed = Batch(payload=payload_of(cfg))
    rows = [
        (r, (spilled if i % 2 else kept)._scores(r, "topk" if i % 2 else payload_of(cfg), 1.0))
        for i, r in enumerate(mixed.rollouts)
    ]
    mixed.mb = collate(rows, pad_id=0, domains=DOMAINS)
    actual, stats = run_compare(mixed, cfg, 3)
    whole, _ = run_compare(kept, cfg, 1000)
    topk, _ = run_compare(spilled, LossConfig(support="teacher_topk", support_k=K), 1000)
    odd_N = torch.tensor([r.prompt.prompt_id % 2 == 1 for r, _ in mixed.tokens])
    close(actual, torch.where(odd_N, topk, whole))
    close(
        gradient(actual, mixed),
        torch.where(odd_N[:, None], gradient(topk, spilled), gradient(whole, kept)),
    )
    close(stats["distill/spilled"], odd_N)


@pytest.mark.parametrize("support", ["full", "union_topk", "teacher_topk", "sampled", "spilled"])
def test_a_student_that_is_its_teacher(support):
    """Every form is 0 there.

    `truncate` alone has a gradient all the same (jsd aside), as `support_divergence` says.
    """
    logits_NV = randn(9, VOCAB, seed=1, scale=2.0)
    logprobs_NV, labels_N = logits_NV.log_softmax(-1), torch.arange(9)
    top_NK, ids_NK = logprobs_NV.topk(K)
    given = {"hidden_MH": logits_NV} if support in ("full", "union_topk") else {}
    part = TeacherSlice(
        **{
            "teacher": "same",
            "token_index_M": torch.arange(9),
            "weights_M": torch.ones(9),
            "entropy_M": torch.ones(9),
            "sampled_logprobs_M": logprobs_NV.gather(-1, labels_N[:, None])[:, 0],
            "logsumexp_M": logits_NV.logsumexp(-1),
            "topk_ids_MK": ids_NK,
            "topk_logprobs_MK": top_NK,
            "hidden_MH": None,
            **given,
        }
    )
    mask_BS = torch.ones(1, 9, dtype=torch.bool)
    mb = replace(
        collate([], pad_id=0, domains=DOMAINS),
        labels_BS=labels_N[None],
        loss_mask_BS=mask_BS,
        teacher_slices=(part,),
    )
    for loss in DIVERGENCES:
        for tail in TAILS:
            if support == "sampled" and (loss, tail) != ("reverse_kl", "bucket"):
                continue
            cfg = LossConfig(
                loss=loss,
                support="full" if support == "spilled" else support,
                support_k=K,
                tail=tail,
            )
            logits = LogitsChunk(
                logits_NV.clone(), form=LogitForm(), temperature=1.0, want_gradient=True
            )
            same = OutputHead(torch.eye(VOCAB, dtype=torch.float64))
            seen = compare(logits, slice(0, 9), mb, head_of=lambda name, same=same: same, cfg=cfg)
            assert seen.divergence_C.abs().max() < 1e-9, (loss, tail)
            found = logits.gradient(seen.divergence_C)
            biased = (
                tail == "truncate"
                and loss != "jsd"
                and support in ("union_topk", "teacher_topk", "spilled")
            )
            assert ((found.dlogits_CV * found.scale_C1).abs().max() > 1e-3) == biased, (loss, tail)


def test_the_teachers_logits_at_the_students_tokens_are_not_rounded():
    """Half-precision states and head, logits of standard deviation 30: as exact as the top-k that
    scoring sends.
    """
    hidden_MH, weight_VH = (
        randn(rows, 64, seed=rows, scale=(30 / 8) ** 0.5).bfloat16() for rows in (50, 400)
    )
    exact_MV = hidden_MH.double() @ weight_VH.double().T
    ids_MK = exact_MV.topk(5).indices
    found = distillation._logits_at(
        hidden_MH, OutputHead(weight_VH), ids_MK, piece_bytes=7 * 2 * 5 * 64 * 4
    )
    assert exact_MV.std() > 25 and found.dtype == torch.float32
    close(found, exact_MV.gather(-1, ids_MK), 1e-4)


def test_overlap_counts_what_the_teacher_sent():
    """Asked for more than the support holds, it compares what there is; a student like its teacher
    agrees wholly.
    """
    cfg = LossConfig(support="teacher_topk", support_k=K, overlap_k=2 * K)
    batch = Batch(payload="topk")
    _, stats = run_compare(batch, cfg, 3)
    by_hand = naive_losses(
        batch, cfg, lambda p, q, y: torch.isin(p.topk(K).indices, q.topk(K).indices).double().mean()
    )
    close(stats["distill/overlap_ratio"], by_hand)


def test_overlap_by_hand():
    """Top 2 of the student (0, 1), of the teacher (1, 2): one in common, so the renormalised sides
    agree there.
    """
    cfg = LossConfig(overlap_k=2)
    found = distillation.overlap_of(
        torch.tensor([[0, 1], [0, 1], [0, 1]]),
        torch.tensor([[1, 2], [2, 3], [1, 0]]),
        torch.tensor([[0.3, 0.1], [0.1, 0.1], [0.3, 0.6]]).log(),
        torch.tensor([[0.5, 0.4], [0.5, 0.4], [0.6, 0.3]]).log(),
    )
    assert found["distill/overlap_ratio"].tolist() == [0.5, 0.0, 1.0] and cfg.overlap_k == 2
    assert found["distill/overlap_mass"].tolist() == pytest.approx([0.3, 0.0, 0.9])
    advantage = found["distill/overlap_advantage"]
    assert advantage[0].item() == pytest.approx(0.0, abs=1e-7) and advantage[1].isnan()
    p, q = (1 / 3, 2 / 3), (2 / 3, 1 / 3)
    by_hand = sum(a * math.log(b / a) for a, b in zip(p, q, strict=True)) / 2
    assert advantage[2].item() == pytest.approx(by_hand, abs=1e-6)


def test_thirds_of_a_response():
    """Whole responses of 1 to 5 tokens: a third of 5 is 2, 2 and 1; a single token is the front."""
    batch = Batch()
    thirds = {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 0, 1, 2], 5: [0, 0, 1, 1, 2]}
    assert batch.mb.response_thirds_N.tolist() == [
        t for r in batch.rollouts for t in thirds[len(r.response_ids)]
    ]
    _, stats = run_compare(batch, LossConfig(), 3)
    for index, name in enumerate(distillation.POSITIONS):
        here_N = batch.mb.response_thirds_N == index
        close(stats[f"distill/k1_{name}"][here_N], stats["distill/k1"][here_N])
        assert stats[f"distill/k1_{name}"][~here_N].isnan().all()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("estimator", ["auto", "k2", "k3"])
def test_sampled_support(estimator, temperature, chunk):
    cfg = LossConfig(
        loss="reverse_kl", support="sampled", estimator=estimator, loss_temperature=temperature
    )
    batch = Batch(temperature, "sampled")
    actual, _ = run_compare(batch, cfg, chunk)

    def of_teacher(p, q, label):
        ratio = q[label] / p[label]
        return ratio.log().square() / 2 if estimator == "k2" else ratio - 1 - ratio.log()

    expected = naive_losses(batch, cfg, of_teacher)
    close(actual, expected)
    close(gradient(actual, batch), gradient(expected, batch))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("support", "payload"),
    [
        ("full", "hidden"),
        ("union_topk", "topk+hidden"),
        ("teacher_topk", "topk"),
        ("sampled", "sampled"),
    ],
)
def test_what_is_watched(support, payload, chunk):
    """Log-probabilities and statistics, at the loss temperature; those of several teachers are
    weighted sums.
    """
    cfg = LossConfig(support=support, support_k=K, loss_temperature=1.7, overlap_k=K)
    batch = Batch(1.7, payload)
    _, stats = run_compare(batch, cfg, chunk)

    def entropy(p):
        return -(p * p.log()).sum()

    student = torch.stack(
        [batch.student_of(n, 1.7)[batch.label(n)].log() for n in range(len(batch.tokens))]
    )
    teacher = naive_losses(batch, cfg, lambda p, q, label: q[label].log())
    close(stats["student"], student)
    close(stats["teacher"], teacher)
    close(stats["distill/k1"], student - teacher)
    close(
        stats["distill/k3"],
        naive_losses(batch, cfg, lambda p, q, y: q[y] / p[y] - 1 - (q[y] / p[y]).log()),
    )
    close(
        stats["distill/teacher_entropy"], naive_losses(batch, cfg, lambda p, q, label: entropy(q))
    )
    close(
        stats["distill/student_entropy"], naive_losses(batch, cfg, lambda p, q, label: entropy(p))
    )
    close(
        stats["distill/entropy_gap"],
        naive_losses(batch, cfg, lambda p, q, label: (entropy(p) - entropy(q)).abs()),
    )
    if support != "sampled":
        common = naive_losses(
            batch,
            cfg,
            lambda p, q, y: torch.isin(p.topk(K).indices, q.topk(K).indices).double().mean(),
        )
        close(stats["distill/overlap_ratio"], common)
    assert not any(
        value.requires_grad for key, value in stats.items() if key.startswith("distill/")
    )
    assert stats["student"].requires_grad and not stats["teacher"].requires_grad


def test_auto_support_and_payload():
    def of(**loss):
        cfg = LossConfig(**loss)
        return support_of(cfg), payload_of(cfg)

    assert of() == ("full", "hidden")
    assert of(loss="jsd") == ("full", "hidden")
    assert of(loss="reverse_kl_pg") == ("sampled", "sampled")
    assert of(loss="forward_kl", support="teacher_topk") == ("teacher_topk", "topk")
    assert of(support="sampled") == ("sampled", "sampled")


def test_nothing_is_written_to_the_arguments():
    for support, payload in (("full", "hidden"), ("teacher_topk", "topk"), ("sampled", "sampled")):
        batch = Batch(payload=payload)
        tensors = [*HEADS.values(), *(v for v in vars_of(batch.mb) if isinstance(v, torch.Tensor))]
        for part in batch.mb.teacher_slices:
            tensors += [v for v in vars_of(part) if isinstance(v, torch.Tensor)]
        assert len(tensors) > 14
        before = [(t, t._version, t.detach().clone()) for t in tensors]
        loss_C, _ = run_compare(batch, LossConfig(support=support, support_k=K), 3)
        loss_C.sum().backward()
        for tensor, version, copy in before:
            assert tensor._version == version and torch.equal(tensor.detach(), copy)


def vars_of(item):
    return [getattr(item, name) for name in item.__slots__]


# ---- The loss of train_mopd.py -------------------------------------------------------------------


def task_advantages(batch):
    return torch.tensor([r.task_advantage for r, _ in batch.tokens], dtype=torch.float64)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_policy_gradient(temperature, chunk):
    """The gradient is -(t - s) grad log p, with t the mixture's weighted log-probability."""
    cfg = LossConfig(loss="reverse_kl_pg", loss_temperature=temperature)
    batch = Batch(temperature, "sampled")
    loss_N, stats = run_token_loss(batch, cfg, chunk)
    s, t = sampled_logprobs(batch, temperature)
    advantages = (t - s).detach()
    close(loss_N, -advantages * s)
    close(gradient(loss_N, batch), gradient(-advantages * s, batch))
    close(stats["distill/k1"], s - t)
    close(stats["distill/advantage_abs"], advantages.abs())
    assert (stats["distill/clip_fraction"] == 0).all()


def test_policy_gradient_advantage_clip():
    cfg = LossConfig(loss="reverse_kl_pg", advantage_clip=1.0)
    batch = Batch(payload="sampled")
    loss_N, stats = run_token_loss(batch, cfg)
    s, t = sampled_logprobs(batch)
    outside = (t - s).detach().abs() > 1.0
    assert 0 < outside.sum() < len(outside)
    expected = -(t - s).detach().clamp(-1, 1) * s
    close(gradient(loss_N, batch), gradient(expected, batch))
    close(stats["distill/clip_fraction"], outside)
    close(stats["distill/k1"], s - t)


@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_policy_gradient_with_a_ppo_clip(dual_clip):
    """The ratio is against the sampler's log-probabilities of the same tokens."""
    cfg = LossConfig(
        loss="reverse_kl_pg", clip_low=0.2, clip_high=0.5, dual_clip=dual_clip, reward_weight=0.5
    )
    batch = Batch(payload="sampled")
    loss_N, _ = run_token_loss(batch, cfg)
    s, t = sampled_logprobs(batch)
    old = torch.cat([torch.tensor(r.rollout_logprobs) for r in batch.rollouts]).double()
    ratios, advantages = (s - old).exp(), (t - s).detach() + 0.5 * task_advantages(batch)
    expected, clipped, bounded_twice = [], 0, 0
    for ratio, advantage in zip(ratios, advantages, strict=True):
        bounded = min(max(ratio.item(), 0.8), 1.5)
        value = max(-advantage * ratio, -advantage * bounded, key=torch.Tensor.item)
        clipped += bounded != ratio.item()
        if dual_clip and advantage < 0:
            bounded_twice += value > -advantage * dual_clip
            value = min(value, -advantage * dual_clip, key=torch.Tensor.item)
        expected.append(value)
    assert 0 < clipped < len(expected)
    assert dual_clip is None or 0 < bounded_twice < len(expected)
    close(loss_N, torch.stack(expected))
    close(gradient(loss_N, batch), gradient(torch.stack(expected), batch))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("loss", "support", "payload"),
    [
        ("reverse_kl", "full", "hidden"),
        ("jsd", "teacher_topk", "topk"),
        ("reverse_kl_pg", "auto", "sampled"),
    ],
)
def test_task_reward_adds_its_policy_gradient(loss, support, payload, chunk):
    cfg = LossConfig(loss=loss, support=support, support_k=K)
    batch = Batch(payload=payload)
    plain, _ = run_token_loss(batch, cfg, chunk)
    mixed, stats = run_token_loss(batch, replace(cfg, reward_weight=0.75), chunk)
    task = -0.75 * task_advantages(batch) * sampled_logprobs(batch)[0]
    close(mixed, plain + task)
    close(gradient(mixed, batch), gradient(plain, batch) + gradient(task, batch))
    close(stats["loss/total"], mixed)
    if loss != "reverse_kl_pg":
        close(stats["loss/task"], task)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(
    ("loss", "payload"), [("reverse_kl", "hidden"), ("reverse_kl_pg", "sampled")]
)
def test_importance_weights_scale_the_loss(loss, payload, level, mode, chunk):
    cfg = LossConfig(
        loss=loss, is_mode=mode, is_level=level, is_low=0.5, is_high=1.5, reward_weight=0.3
    )
    batch = Batch(payload=payload)
    trainer_N = sampled_logprobs(batch)[0].detach().float()
    weighted, stats = run_token_loss(batch, cfg, chunk, logprobs_N=trainer_N)
    plain, _ = run_token_loss(batch, replace(cfg, is_mode="none"), chunk)

    expected, offset = [], 0
    for r in batch.rollouts:
        L = len(r.response_ids)
        log_ratios = [float(trainer_N[offset + t]) - r.rollout_logprobs[t] for t in range(L)]
        offset += L
        if level == "sequence":
            log_ratios = [sum(log_ratios)] * L
        elif level == "geometric":
            log_ratios = [sum(log_ratios) / L] * L
        ratios = [math.exp(x) for x in log_ratios]
        expected += [
            min(x, 1.5) if mode == "truncate" else x if 0.5 <= x <= 1.5 else 0.0 for x in ratios
        ]
    weights_N = torch.tensor(expected, dtype=torch.float64)
    assert len(set(expected)) > 3
    close(stats["mismatch/weight_mean"], weights_N, 1e-5)
    close(stats["mismatch/weight_zero_fraction"], weights_N == 0)
    close(weighted, weights_N * plain, 1e-5)
    close(gradient(weighted, batch), weights_N[:, None] * gradient(plain, batch), 1e-5)
    close(stats["loss/total"], weighted)


def test_statistics_are_summed_overall_and_per_domain():
    batch = Batch()
    domain_ids_N = batch.mb.at_loss_tokens(batch.mb.domain_ids_B)
    values_N = torch.arange(len(batch.tokens), dtype=torch.float64)
    values_N[3] = torch.nan  # a token that the statistic does not cover
    sums = summarise({"loss/total": values_N}, domain_ids_N, DOMAINS)
    covered = [(n, r.prompt.domain) for n, (r, _) in enumerate(batch.tokens) if n != 3]
    assert [float(x) for x in sums["loss/total"]] == [sum(n for n, _ in covered), len(covered)]
    for domain in DOMAINS:
        mine = [n for n, d in covered if d == domain]
        assert [float(x) for x in sums[f"loss/total/{domain}"]] == [sum(mine), len(mine)]
    assert set(sums) == {"loss/total", *(f"loss/total/{d}" for d in DOMAINS)}
    values_N[5] = torch.inf  # stays what it is, where it is
    sums = summarise({"loss/total": values_N}, domain_ids_N, DOMAINS)
    infinite = [d for d in DOMAINS if torch.isinf(sums[f"loss/total/{d}"][0])]
    assert torch.isinf(sums["loss/total"][0]) and infinite == [batch.tokens[5][0].prompt.domain]
    assert not any(torch.isnan(total) for total, _ in sums.values())


def test_shares_are_of_the_whole_batch():
    batch = Batch()
    domain_ids_N = batch.mb.at_loss_tokens(batch.mb.domain_ids_B)
    values_N = torch.arange(1.0, 1 + len(batch.tokens))
    sums = summarise({"distill/advantage_abs": values_N}, domain_ids_N, DOMAINS)
    shares = [
        float(total / count)
        for d in DOMAINS
        for total, count in [sums[f"distill/advantage_share/{d}"]]
    ]
    by_hand = [
        sum(v for v, i in zip(values_N.tolist(), domain_ids_N.tolist(), strict=True) if i == d)
        for d in range(3)
    ]
    assert shares == pytest.approx([v / float(values_N.sum()) for v in by_hand]) and sum(
        shares
    ) == pytest.approx(1)


def test_a_filler_gives_a_gradient_of_no_rows():
    """A rank that has run out of rollouts runs the same backward."""
    filler = collate([], pad_id=0, domains=DOMAINS)
    logits_0V = torch.zeros(0, VOCAB, dtype=torch.float64)
    for cfg in (
        LossConfig(),
        LossConfig(loss="reverse_kl_pg"),
        LossConfig(support="teacher_topk", is_mode="mask"),
    ):
        pool = TeacherPool(
            [],
            {},
            cfg,
            payload=payload_of(cfg),
            cache_bytes=0,
            shared_vocab=VOCAB,
            device=CPU,
            turns=iter,
        )
        logits = LogitsChunk(
            logits_0V.clone(), form=LogitForm(), temperature=1.0, want_gradient=True
        )
        loss_0, stats = token_loss(
            logits, slice(0, 0), filler, torch.zeros(0), teachers=pool, cfg=cfg
        )
        assert loss_0.shape == (0,) and logits.gradient(loss_0).dlogits_CV.shape == (0, VOCAB)
        assert (
            stats.keys()
            == run_token_loss(
                Batch(payload=payload_of(cfg)), cfg, logprobs_N=torch.zeros(len(Batch().tokens))
            )[1].keys()
        )
