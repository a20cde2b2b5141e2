"""What corrects a sampler that is not the student of the moment: weights, rejection, an old policy
of its own.

Written out in float64 with numbers of one token each, and by statistics: an estimate from a stale
sampler is unbiased where the weights are, and is not without them.

B sequences, S padded length, N loss tokens, V vocabulary, G parameters of a table.
"""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.config import LossConfig
from opd.losses import (
    IMPORTANCE_LEVELS,
    accepted_sequences,
    distillation_advantage,
    importance_weights,
    policy_gradient_loss,
)
from tests.support.batches import Batch, close, gradient, run_token_loss, sampled_logprobs
from tests.support.processes import ROOT

GOLDEN = json.loads((ROOT / "tests" / "support" / "golden" / "losses.json").read_text())[
    "importance_weights"
]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- Weights and rejection, written out ----------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_golden_rejection(case, level):
    """The mode mask at the same level has the same bounds; the padding holds rubbish that nobody
    may read.
    """
    trainer_BS = f64([[math.nan, *case["train_logprobs"], -math.inf]])
    sampler_BS = f64([[0.0, *case["rollout_logprobs"], -math.inf]])
    mask_BS = torch.tensor([[False, True, True, True, False]])
    accepted_B = accepted_sequences(
        trainer_BS, sampler_BS, mask_BS, level=level, low=case["low"], high=case["high"]
    )
    assert accepted_B.tolist() == [case[f"{level}_mask"] != 0]
    ratio = case[f"{level}_ratio"]
    below, above = ratio * 0.999, ratio * 1.001
    for low, high, inside in ((below, above, True), (above, 9.0, False), (0.1, below, False)):
        assert (
            accepted_sequences(
                trainer_BS, sampler_BS, mask_BS, level=level, low=low, high=high
            ).item()
            == inside
        )


def test_golden_weights_at_every_level():
    for case in GOLDEN:
        pair = f64([case["train_logprobs"]]), f64([case["rollout_logprobs"]])
        for level in IMPORTANCE_LEVELS:
            for high in (case["high"], math.inf):
                weights_BS = importance_weights(
                    *pair,
                    torch.ones_like(pair[0]),
                    mode="truncate",
                    level=level,
                    low=1.0,
                    high=high,
                )
                ratios = case[f"{level}_ratio"]
                expected = ratios if level == "token" else [ratios] * len(case["train_logprobs"])
                torch.testing.assert_close(weights_BS, f64([expected]).clamp(max=high))


LOGPROB = st.floats(-8, 0)
SEQUENCES = st.lists(st.lists(st.tuples(LOGPROB, LOGPROB), max_size=5), min_size=1, max_size=4)


@given(SEQUENCES, st.sampled_from(["sequence", "geometric"]), st.floats(0.05, 1), st.floats(1, 20))
def test_rejection_of_any_batch(sequences, level, low, high):
    trainer_BS, sampler_BS = torch.full((2, len(sequences), 6), math.nan, dtype=torch.float64)
    mask_BS = torch.zeros(len(sequences), 6, dtype=torch.bool)
    sure, expected = [], []
    for row, tokens in enumerate(sequences):
        log_ratio = math.fsum(trainer - sampler for trainer, sampler in tokens)
        if level == "geometric" and tokens:
            log_ratio /= len(tokens)
        for at, (trainer, sampler) in enumerate(tokens):
            trainer_BS[row, at], sampler_BS[row, at], mask_BS[row, at] = trainer, sampler, True
        expected.append(not tokens or math.log(low) <= log_ratio <= math.log(high))
        # not on a bound
        sure.append(min(abs(log_ratio - math.log(low)), abs(log_ratio - math.log(high))) > 1e-9)
    accepted_B = accepted_sequences(
        trainer_BS, sampler_BS, mask_BS, level=level, low=low, high=high
    )
    assert [a for a, s in zip(accepted_B.tolist(), sure, strict=True) if s] == [
        e for e, s in zip(expected, sure, strict=True) if s
    ]


def test_a_ratio_on_a_bound_is_inside_and_an_undefined_one_is_not():
    pair = torch.zeros(2, 3), torch.zeros(2, 3)
    mask_BS = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert accepted_sequences(*pair, mask_BS, level="sequence", low=1.0, high=1.0).tolist() == [
        True,
        True,
    ]
    assert accepted_sequences(*pair, mask_BS, level="sequence", low=2.0, high=3.0).tolist() == [
        False,
        True,
    ]
    undefined = torch.full((2, 3), math.nan), torch.zeros(2, 3)
    assert accepted_sequences(
        *undefined, mask_BS, level="geometric", low=0.1, high=9.0
    ).tolist() == [False, True]
    assert accepted_sequences(*undefined, mask_BS, level="none", low=1.0, high=1.0).tolist() == [
        True,
        True,
    ]
    with pytest.raises(ValueError, match="level='token': choose one of none, sequence, geometric"):
        accepted_sequences(*pair, mask_BS, level="token", low=0.5, high=2.0)


# ---- The loss of a token -------------------------------------------------------------------------

PG = LossConfig(loss="reverse_kl_pg", clip_low=0.2, clip_high=0.4, reward_weight=0.3)
FORMS = {
    "pg": (PG, "sampled"),
    "full": (LossConfig(), "hidden"),
    "jsd": (LossConfig(loss="jsd"), "hidden"),
}


def sampler_of(batch):
    return batch.mb.at_loss_tokens(batch.mb.rollout_logprobs_BS)


def old_of(batch, scale=0.3):
    """A policy between sampler and student, and not quite either."""
    noise_N = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(3))
    return sampled_logprobs(batch)[0].detach().float() + scale * noise_N


def by_sequence(batch, values_N):
    return values_N.split([len(r.response_ids) for r in batch.rollouts])


def naive_weights(batch, trainer_N, cfg):
    """w_is, [N], one response at a time."""
    weights = []
    for log_ratios in by_sequence(batch, trainer_N.double() - sampler_of(batch).double()):
        logs = log_ratios.tolist()
        whole = {
            "token": logs,
            "sequence": [sum(logs)] * len(logs),
            "geometric": [sum(logs) / len(logs)] * len(logs),
        }
        ratios = [math.exp(x) for x in whole[cfg.is_level]]
        if cfg.is_mode == "none":
            ratios = [1.0] * len(logs)
        elif cfg.is_mode == "truncate":
            ratios = [min(x, cfg.is_high) for x in ratios]
        else:
            ratios = [x if cfg.is_low <= x <= cfg.is_high else 0.0 for x in ratios]
        if cfg.reject_level != "none":
            rejected = not cfg.reject_low <= math.exp(whole[cfg.reject_level][0]) <= cfg.reject_high
            ratios = [0.0] * len(logs) if rejected else ratios
        weights += ratios
    return f64(weights)


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("reject", ["none", "sequence", "geometric"])
@pytest.mark.parametrize(
    ("mode", "level"),
    [("none", "token"), *itertools.product(("truncate", "mask"), IMPORTANCE_LEVELS)],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_decoupled_loss(form, mode, level, reject, chunk):
    """w(old / sampler) * PPO(current / old), and w(old / sampler) * D: values and gradients from
    the definitions.
    """
    plain, payload = FORMS[form]
    plain = replace(plain, old_logprobs="recompute")
    bounds = {"is_low": 0.7, "is_high": 1.2, "reject_low": 0.8, "reject_high": 1.3}
    cfg = replace(plain, is_mode=mode, is_level=level, reject_level=reject, **bounds)
    batch = Batch(payload=payload)
    old_N = old_of(batch)
    batch.mb = batch.mb.with_old_logprobs(old_N)
    loss_N, stats = run_token_loss(batch, cfg, chunk, logprobs_N=None)

    weights_N = naive_weights(batch, old_N, cfg)
    if form == "pg":
        s, t = sampled_logprobs(batch)
        task_N = f64([r.task_advantage for r, _ in batch.tokens])
        ratio_N, advantage_N = (
            (s - old_N.double()).exp(),
            (t - s).detach() + cfg.reward_weight * task_N,
        )
        base_N = -torch.minimum(
            advantage_N * ratio_N, advantage_N * ratio_N.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        )
    else:
        base_N, _ = run_token_loss(batch, replace(plain, old_logprobs="rollout"), chunk)
    assert reject == "none" or 0 < (weights_N == 0).sum() < len(weights_N)
    close(loss_N, weights_N * base_N, 1e-5)
    close(gradient(loss_N, batch), weights_N[:, None] * gradient(base_N, batch), 1e-5)
    if mode != "none" or reject != "none":
        close(stats["mismatch/weight_mean"], weights_N, 1e-5)
        close(stats["mismatch/weight_zero_fraction"], weights_N == 0)
        assert ("mismatch/weight_cut_fraction" in stats) == (mode != "none")


@pytest.mark.parametrize("form", FORMS)
def test_where_the_old_policy_is_the_sampler_it_is_ppo(form):
    """All weights are 1 and nothing is rejected: the loss, bit for bit, of a run that corrects
    nothing.
    """
    plain, payload = FORMS[form]
    batch = Batch(payload=payload)
    expected, _ = run_token_loss(batch, plain)
    batch.mb = batch.mb.with_old_logprobs(sampler_of(batch))
    strict = {name: 1.0 for name in ("is_low", "is_high", "reject_low", "reject_high")}
    strict |= {"is_mode": "mask", "reject_level": "sequence"}
    loss_N, _ = run_token_loss(batch, replace(plain, old_logprobs="recompute", **strict))
    assert torch.equal(loss_N, expected) and torch.equal(
        gradient(loss_N, batch), gradient(expected, batch)
    )


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_where_the_old_policy_is_the_current_one_it_is_the_weighted_loss(form, level):
    """As in the first update of a step.

    The PPO ratio is 1 there, so the gradient is that of REINFORCE with weights.
    """
    plain, payload = FORMS[form]
    weighted = replace(
        plain, is_mode="truncate", is_level=level, is_high=1.3, clip_low=None, clip_high=None
    )
    batch = Batch(payload=payload)
    current_N = sampled_logprobs(batch)[0].detach().float()
    expected, _ = run_token_loss(batch, weighted, logprobs_N=current_N)
    batch.mb = batch.mb.with_old_logprobs(current_N)
    clip = {"clip_low": plain.clip_low, "clip_high": plain.clip_high}
    loss_N, _ = run_token_loss(batch, replace(weighted, old_logprobs="recompute", **clip))
    close(gradient(loss_N, batch), gradient(expected, batch), 1e-5)
    if form != "pg":
        assert torch.equal(loss_N, expected)


@pytest.mark.parametrize("form", FORMS)
def test_rejection_without_an_old_policy_is_by_the_student_of_the_moment(form):
    plain, payload = FORMS[form]
    batch = Batch(payload=payload)
    cfg = replace(
        plain,
        reject_level="geometric",
        reject_low=0.8,
        reject_high=1.2,
        is_mode="truncate",
        is_high=1.1,
    )
    current_N = sampled_logprobs(batch)[0].detach().float()
    loss_N, _ = run_token_loss(batch, cfg, logprobs_N=current_N)
    base_N, _ = run_token_loss(batch, plain)
    weights_N = naive_weights(batch, current_N, cfg)
    rejected = [bool((w == 0).all()) for w in by_sequence(batch, weights_N)]
    assert 0 < sum(rejected) < len(rejected)
    close(loss_N, weights_N * base_N, 1e-5)
    close(gradient(loss_N, batch), weights_N[:, None] * gradient(base_N, batch), 1e-5)


def test_log_probabilities_go_to_their_places_and_back():
    batch = Batch(payload="sampled")
    old_N = old_of(batch)
    mb = batch.mb.with_old_logprobs(old_N)
    assert torch.equal(mb.at_loss_tokens(mb.old_logprobs_BS), old_N)
    assert (mb.old_logprobs_BS[~mb.loss_mask_BS] == 0).all()
    assert batch.mb.old_logprobs_BS is None
    assert torch.equal(mb.to(torch.device("cpu")).old_logprobs_BS, mb.old_logprobs_BS)


# ---- Staleness, by statistics --------------------------------------------------------------------

V, SAMPLES = 3, 40_000
# Quantile 0.999 of the chi-square distribution with 8 degrees of freedom: a right estimate fails
# one seed in a thousand.
RANK, QUANTILE = (V - 1) * (1 + V), 26.12


def tables(seed, scale):
    """Logits of a policy over two tokens: [1 + V, V], row 0 of the first token, row 1 + y of what
    follows y.
    """
    return (
        torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    )


STUDENT, TEACHER = tables(0, 1.0).log_softmax(-1), tables(1, 1.0).log_softmax(-1)
STALE, OLD = (STUDENT + tables(2, 0.5)).log_softmax(-1), (STUDENT + tables(3, 0.2)).log_softmax(-1)


def exact_gradient(prefixes):
    """Of sum over both tokens of the reverse KL given the prefix, prefixes by a policy, by the
    student's logits: [G].
    """
    logits = STUDENT.clone().requires_grad_()
    s = logits.log_softmax(-1)
    kl = (s.exp() * (s - TEACHER)).sum(-1)
    reached = torch.cat([torch.ones(1, dtype=torch.float64), prefixes[0].exp()])
    return torch.autograd.grad((reached * kl).sum(), logits)[0].flatten()


def estimates(weights_of, **clip):
    """A gradient [G] from each of the stale policy's samples, through the functions of the loss."""
    generator = torch.Generator().manual_seed(20)
    first_B = torch.multinomial(STALE[0].exp(), SAMPLES, replacement=True, generator=generator)
    second_B = torch.multinomial(STALE[1 + first_B].exp(), 1, generator=generator)[:, 0]
    state_BS, token_BS = (
        torch.stack([torch.zeros_like(first_B), 1 + first_B], 1),
        torch.stack([first_B, second_B], 1),
    )
    student, teacher, stale, old = (
        table[state_BS, token_BS] for table in (STUDENT, TEACHER, STALE, OLD)
    )
    logprobs_BS = student.clone().requires_grad_()
    advantages_BS = distillation_advantage(logprobs_BS, teacher, clip=None)
    loss_BS = policy_gradient_loss(logprobs_BS, old, advantages_BS, **clip) * weights_of(
        student, old, stale
    )
    (slope_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
    score_BSV = torch.nn.functional.one_hot(token_BS, V) - STUDENT.exp()[state_BS]
    gradients = torch.zeros(SAMPLES, 1 + V, V, dtype=torch.float64)
    for position in (0, 1):
        gradients[torch.arange(SAMPLES), state_BS[:, position]] += (
            slope_BS[:, position, None] * score_BSV[:, position]
        )
    return gradients.flatten(1)


def distance(samples, expected):
    """Hotelling's statistic of the samples' mean: chi-square with RANK degrees of freedom where it
    is the expected one.

    The V^2 responses have as many degrees of freedom as the gradients, so all that is unbiased has
    the same statistic.
    """
    off = samples.mean(0) - expected
    return float(len(samples) * off @ torch.linalg.pinv(torch.cov(samples.T), rtol=1e-10) @ off)


def weights(level, high=1e9):
    options = {"mode": "truncate", "level": level, "low": 1e-9, "high": high}
    return lambda student, old, stale: importance_weights(
        student, stale, torch.ones_like(stale), **options
    )


def weights_of_old(level):
    return lambda student, old, stale: weights(level)(old, None, stale)


def test_the_samples_have_the_degrees_of_freedom_of_the_test():
    singular = torch.linalg.svdvals(torch.cov(estimates(weights("token")).T))
    assert (singular > 1e-6).sum() == RANK


def test_a_stale_sampler_is_corrected_without_bias():
    """At the level token given the sampler's prefixes, at the level sequence for the student's own
    responses.
    """
    assert distance(estimates(weights("token")), exact_gradient(STALE)) < QUANTILE
    assert distance(estimates(weights("sequence")), exact_gradient(STUDENT)) < QUANTILE


def test_two_ratios_correct_it_as_one_does():
    """The updates since the old policy by the PPO ratio, which no clip reaches here, the rest by
    the weights.
    """
    unbounded = {"clip_low": 0.999, "clip_high": 1e9}
    assert (
        distance(estimates(weights_of_old("token"), **unbounded), exact_gradient(STALE)) < QUANTILE
    )


@pytest.mark.parametrize(
    ("weights_of", "clip"),
    [
        (lambda student, old, stale: 1.0, {}),  # no correction
        (
            weights_of_old("token"),
            {},
        ),  # REINFORCE from the old policy's weights: the updates since are not seen
        (weights("token", high=1.0), {}),  # a bound that many ratios reach
        (weights("geometric"), {}),
    ],
)
def test_without_it_the_estimate_is_biased(weights_of, clip):
    samples = estimates(weights_of, **clip)
    assert distance(samples, exact_gradient(STALE)) > 4 * QUANTILE
    assert distance(samples, exact_gradient(STUDENT)) > 4 * QUANTILE
