"""Divergences, estimators, policy gradient and importance weights against golden values and exact
enumeration.

`golden/losses.json` holds values in float64 and gradients with respect to the student's logits,
found by finite differences: values agree to 1e-12, gradients to 1e-9.
"""

import itertools
import json
import math

import pytest
import torch

from opd.losses import (
    DIVERGENCES,
    ESTIMATORS,
    IMPORTANCE_LEVELS,
    IMPORTANCE_MODES,
    TAILS,
    distillation_advantage,
    divergence,
    importance_weights,
    kl_estimate,
    policy_gradient_loss,
    support_divergence,
)
from opd.topk import gather_logprobs, topk_logprobs, union_support
from tests.support.processes import ROOT

GOLDEN = json.loads((ROOT / "tests" / "support" / "golden" / "losses.json").read_text())
OPTIONS = ("kind", "tail", "jsd_beta", "skew_alpha")


def f64(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def randn(*shape, seed=0, scale=1.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    )


def golden_cases(form):
    cases = []
    for index, case in enumerate(GOLDEN["divergence"]):
        for expected in case[form]:
            options = {name: expected[name] for name in OPTIONS if name in expected}
            name = "-".join(str(value) for value in (index, *options.values()))
            cases.append(pytest.param(case, options, expected, id=name))
    return cases


def assert_golden(loss_N, logits_NV, expected):
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    assert loss_N.dtype == torch.float64 and loss_N.shape == (1,)
    torch.testing.assert_close(loss_N, f64([expected["loss"]]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad_NV, f64([expected["grad"]]), atol=1e-9, rtol=0)


# -------------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize(("case", "options", "expected"), golden_cases("full"))
def test_golden_full_divergence(case, options, expected):
    student_NV = f64([case["student_logits"]], requires_grad=True)
    teacher_NV = f64([case["teacher_logits"]])
    assert_golden(
        divergence(student_NV, teacher_NV, temperature=case["temperature"], **options),
        student_NV,
        expected,
    )


@pytest.mark.parametrize(("case", "options", "expected"), golden_cases("support"))
def test_golden_support_divergence(case, options, expected):
    student_NV = f64([case["student_logits"]], requires_grad=True)
    ids_NK = torch.tensor([case["support_ids"]])
    student_NK = gather_logprobs(student_NV / case["temperature"], ids_NK)
    teacher_NK = gather_logprobs(f64([case["teacher_logits"]]) / case["temperature"], ids_NK)
    assert_golden(support_divergence(student_NK, teacher_NK, **options), student_NV, expected)


def test_golden_covers_every_divergence_and_tail():
    full = {row["kind"] for case in GOLDEN["divergence"] for row in case["full"]}
    tails = {row["tail"] for case in GOLDEN["divergence"] for row in case["support"]}
    assert full == set(DIVERGENCES) and tails == set(TAILS)


def test_worked_example_of_the_docstring():
    p, q = f64([[0.9, 0.1]]).log(), f64([[0.1, 0.9]]).log()
    torch.testing.assert_close(divergence(p, q, kind="reverse_kl"), f64([0.8 * math.log(9)]))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tail", ["full", *TAILS])
def test_equal_student_and_teacher(kind, tail):
    """The value is 0 in every form.

    So is the gradient, except in `truncate`, the form with the wrong minimiser.
    """
    logits_NV = randn(6, 20, scale=3).requires_grad_(True)
    teacher_NV = logits_NV.detach().clone()
    if tail == "full":
        loss_N = divergence(logits_NV, teacher_NV, kind=kind)
    else:
        ids_NK, teacher_NK, _ = topk_logprobs(teacher_NV, 5)
        loss_N = support_divergence(
            gather_logprobs(logits_NV, ids_NK), teacher_NK, kind=kind, tail=tail
        )
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    torch.testing.assert_close(loss_N, torch.zeros_like(loss_N), atol=1e-6, rtol=0)
    if tail == "truncate" and kind != "jsd":
        assert grad_NV.abs().max() > 1e-3
    else:
        torch.testing.assert_close(grad_NV, torch.zeros_like(grad_NV), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bucket_and_generalized_see_the_mass_that_renormalize_does_not(kind):
    teacher_NK = f64([[0.6, 0.3]]).log()
    student_NK = teacher_NK + math.log(0.5)  # the same conditional distribution, half the mass
    loss = {
        tail: support_divergence(student_NK, teacher_NK, kind=kind, tail=tail).item()
        for tail in TAILS
    }
    assert abs(loss["renormalize"]) < 1e-12
    assert loss["bucket"] > 1e-3 and loss["generalized"] > 1e-3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(kind):
    student_NV, teacher_NV = randn(5, 9), randn(5, 9, seed=1)
    full_N = divergence(student_NV, teacher_NV, kind=kind)
    for tail in TAILS:
        support_N = support_divergence(
            student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), kind=kind, tail=tail
        )
        torch.testing.assert_close(support_N, full_N, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_support_of_mass_one_has_finite_gradients(kind, tail, dtype):
    student_NV = torch.tensor(
        [[50.0, 0.0, -50.0], [0.3, 0.2, -90.0]], dtype=dtype, requires_grad=True
    )
    teacher_NV = torch.tensor([[0.5, 49.0, -60.0], [0.2, 0.2, -80.0]], dtype=dtype)
    ids_NK = torch.tensor([[0, 1], [0, 1]])
    loss_N = support_divergence(
        gather_logprobs(student_NV, ids_NK),
        gather_logprobs(teacher_NV, ids_NK),
        kind=kind,
        tail=tail,
    )
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    assert loss_N.isfinite().all() and grad_NV.isfinite().all()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_slot_adds_nothing(kind, tail):
    student_NV, teacher_NV = randn(1, 8).requires_grad_(True), randn(1, 8, seed=1)
    ids_NM, is_duplicate_NM = union_support(torch.tensor([[1, 2]]), torch.tensor([[2, 5]]))
    losses = []
    for ids, is_empty in (
        (ids_NM, is_duplicate_NM),
        (torch.tensor([[1, 2, 5]]), torch.zeros(1, 3, dtype=torch.bool)),
    ):
        student, teacher = (
            gather_logprobs(logits_NV, ids).masked_fill(is_empty, -math.inf)
            for logits_NV in (student_NV, teacher_NV)
        )
        losses.append(support_divergence(student, teacher, kind=kind, tail=tail).sum())
    grads = [torch.autograd.grad(loss, student_NV)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])


def minimise_on_support(teacher_NV, ids_NK, *, kind, tail):
    """The student's mass on the support where the loss is least."""
    logits_NV = torch.zeros_like(teacher_NV).requires_grad_(True)
    teacher_NK = gather_logprobs(teacher_NV, ids_NK)
    optimizer = torch.optim.LBFGS([logits_NV], max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = support_divergence(
            gather_logprobs(logits_NV, ids_NK), teacher_NK, kind=kind, tail=tail
        ).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return gather_logprobs(logits_NV.detach(), ids_NK).exp().sum().item()


@pytest.mark.parametrize(
    ("kind", "tail", "low", "high"),
    [
        ("reverse_kl", "bucket", 0.869, 0.871),
        ("forward_kl", "bucket", 0.869, 0.871),
        ("reverse_kl", "generalized", 0.869, 0.871),
        ("forward_kl", "generalized", 0.869, 0.871),
        ("reverse_kl", "truncate", 0.87 / math.e - 0.001, 0.87 / math.e + 0.001),
        ("forward_kl", "truncate", 0.99, 1.0),
    ],
)
def test_where_each_tail_has_its_minimum(kind, tail, low, high):
    """A teacher with mass .87 on its top 10 of 50: only the unbiased tails make the student put .87
    there.
    """
    inside, outside = randn(10).softmax(0) * 0.87, randn(40, seed=1, scale=0.1).softmax(0) * 0.13
    teacher_NV = torch.cat([inside, outside]).log()[None]
    mass = minimise_on_support(teacher_NV, torch.arange(10)[None], kind=kind, tail=tail)
    assert low <= mass <= high


def test_temperature_divides_both_sides():
    student_NV, teacher_NV = randn(3, 6), randn(3, 6, seed=1)
    torch.testing.assert_close(
        divergence(student_NV, teacher_NV, kind="jsd", temperature=2.0),
        divergence(student_NV / 2, teacher_NV / 2, kind="jsd"),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student_NV, teacher_NV = randn(3, 6).to(dtype), randn(3, 6, seed=1).to(dtype)
    loss_N = divergence(student_NV, teacher_NV, kind="reverse_kl")
    torch.testing.assert_close(
        loss_N, divergence(student_NV.float(), teacher_NV.float(), kind="reverse_kl")
    )
    student_NK, teacher_NK = (
        student_NV.float().log_softmax(-1).to(dtype),
        teacher_NV.float().log_softmax(-1).to(dtype),
    )
    loss_N = support_divergence(student_NK[:, :3], teacher_NK[:, :3], kind="jsd", tail="bucket")
    assert loss_N.dtype == torch.float32


# --------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", GOLDEN["estimators"])
def test_golden_estimators(case, estimator):
    estimate = kl_estimate(
        f64([case["student_logprob"]]), f64([case["teacher_logprob"]]), estimator=estimator
    )
    torch.testing.assert_close(estimate, f64([case[estimator]]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    s_V, t_V = randn(5).log_softmax(-1), randn(5, seed=1).log_softmax(-1)
    expected = divergence(s_V[None], t_V[None], kind="reverse_kl")[0]
    torch.testing.assert_close(
        (s_V.exp() * kl_estimate(s_V, t_V, estimator=estimator)).sum(), expected
    )


def test_the_expected_gradient_of_k2_is_that_of_reverse_kl():
    logits_V, t_V = randn(5).requires_grad_(True), randn(5, seed=1).log_softmax(-1)
    s_V = logits_V.log_softmax(-1)
    expected_k2 = (s_V.exp().detach() * kl_estimate(s_V, t_V, estimator="k2")).sum()
    (grad,) = torch.autograd.grad(expected_k2, logits_V)
    (exact,) = torch.autograd.grad(
        divergence(logits_V[None], t_V[None], kind="reverse_kl").sum(), logits_V
    )
    torch.testing.assert_close(grad, exact, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------- policy gradient


@pytest.mark.parametrize("case", GOLDEN["policy_gradient"])
def test_golden_policy_gradient(case):
    logprobs, old_logprobs = f64(case["new_logprobs"]), f64(case["old_logprobs"])
    advantages = distillation_advantage(old_logprobs, f64(case["teacher_logprobs"]), clip=None)
    clips = {name: case[name] for name in ("clip_low", "clip_high", "dual_clip")}
    torch.testing.assert_close(
        policy_gradient_loss(logprobs, old_logprobs, advantages, **clips), f64(case["loss"])
    )
    reinforce = policy_gradient_loss(
        logprobs, old_logprobs, advantages, clip_low=None, clip_high=None, dual_clip=None
    )
    torch.testing.assert_close(reinforce, f64(case["reinforce_loss"]))


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_only():
    logprobs, old_logprobs = f64([-1.0, -1.0]), f64([-4.0, -4.0])  # r = e^3 = 20.1
    advantages = f64([-2.0, 2.0])
    plain = policy_gradient_loss(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2)
    bounded = policy_gradient_loss(
        logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    torch.testing.assert_close(plain, f64([2 * math.exp(3), -2.4]))
    torch.testing.assert_close(bounded, f64([6.0, -2.4]))


def test_clip_high_defaults_to_clip_low_and_extreme_ratios_stay_finite():
    logprobs = f64([-1.0, -900.0]).requires_grad_(True)
    args = (logprobs, f64([-900.0, -1.0]), f64([1.0, -1.0]))
    loss = policy_gradient_loss(*args, clip_low=0.2)
    torch.testing.assert_close(loss, policy_gradient_loss(*args, clip_low=0.2, clip_high=0.2))
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_advantage_is_detached_and_clipped():
    student, teacher = f64([-1.0, -9.0, -1.0]).requires_grad_(True), f64([-9.0, -1.0, -0.5])
    assert distillation_advantage(student, teacher, clip=None).tolist() == [-8.0, 8.0, 0.5]
    advantages = distillation_advantage(student, teacher, clip=5.0)
    assert advantages.tolist() == [-5.0, 5.0, 0.5] and not advantages.requires_grad


def test_the_expected_policy_gradient_is_the_reverse_kl_gradient():
    """Enumerated: sum_v p(v) grad(-A(v) log p(v)) with A = t - s, over a vocabulary of 5."""
    logits_V, teacher_V = randn(5).requires_grad_(True), randn(5, seed=1)
    s_V, t_V = logits_V.log_softmax(-1), teacher_V.log_softmax(-1)
    old_V = s_V.detach()
    (exact,) = torch.autograd.grad(
        divergence(logits_V[None], teacher_V[None], kind="reverse_kl").sum(), logits_V
    )
    advantages_V = distillation_advantage(s_V, t_V, clip=None)
    for clips in (
        {"clip_low": None},
        {"clip_low": 0.2, "clip_high": 0.2},
    ):  # REINFORCE; PPO at its first update
        loss_V = policy_gradient_loss(s_V, old_V, advantages_V, **clips)
        (grad,) = torch.autograd.grad((old_V.exp() * loss_V).sum(), logits_V, retain_graph=True)
        torch.testing.assert_close(grad, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("reward_to_go", [False, True])
def test_the_expected_policy_gradient_over_two_steps(reward_to_go):
    """Two steps, a table policy: first token from tables[0], second from tables[1 + first].

    With each token's own advantage, the gradient is that of the reverse KL summed over the
    student's states with the states held fixed. With the sum of advantages from the token on, it is
    that of the reverse KL of whole sequences.
    """
    vocab = 5
    tables = randn(1 + vocab, vocab).requires_grad_(True)
    s, t = tables.log_softmax(-1), randn(1 + vocab, vocab, seed=1).log_softmax(-1)
    expected_loss, sequence_kl = 0.0, 0.0
    for first, second in itertools.product(range(vocab), repeat=2):
        logprobs = torch.stack([s[0, first], s[1 + first, second]])
        teacher_logprobs = torch.stack([t[0, first], t[1 + first, second]])
        advantages = distillation_advantage(logprobs, teacher_logprobs, clip=None)
        if reward_to_go:
            advantages = advantages.flip(0).cumsum(0).flip(0)
        probability = logprobs.sum().exp()
        loss = policy_gradient_loss(logprobs, logprobs.detach(), advantages).sum()
        expected_loss = expected_loss + probability.detach() * loss
        sequence_kl = sequence_kl + probability * (logprobs - teacher_logprobs).sum()
    state_kl = divergence(tables, t, kind="reverse_kl")
    fixed_states_kl = state_kl[0] + (s[0].exp().detach() * state_kl[1:]).sum()
    (grad,) = torch.autograd.grad(expected_loss, tables, retain_graph=True)
    (exact,) = torch.autograd.grad(sequence_kl if reward_to_go else fixed_states_kl, tables)
    torch.testing.assert_close(grad, exact, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------- importance weights


@pytest.mark.parametrize("case", GOLDEN["importance_weights"])
@pytest.mark.parametrize(
    "form", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
)
def test_golden_importance_weights(case, form):
    """One padded slot at each end, and it holds rubbish: it must be neither used nor returned."""
    level, mode = form.split("_")
    logprobs_BS = f64([[math.nan, *case["train_logprobs"], -math.inf]], requires_grad=True)
    rollout_logprobs_BS = f64([[0.0, *case["rollout_logprobs"], -math.inf]])
    mask_BS = torch.tensor([[False, *[True] * len(case["train_logprobs"]), False]])
    bounds = {"low": case["low"], "high": case["high"]}
    weights_BS = importance_weights(
        logprobs_BS, rollout_logprobs_BS, mask_BS, mode=mode, level=level, **bounds
    )
    expected = case[form] if level == "token" else [case[form]] * len(case["train_logprobs"])
    torch.testing.assert_close(weights_BS, f64([[0.0, *expected, 0.0]]))
    assert not weights_BS.requires_grad


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_rows_are_independent_and_an_empty_row_is_zero(level):
    logprobs_BS, rollout_logprobs_BS = -randn(3, 4).abs(), -randn(3, 4, seed=1).abs()
    mask_BS = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    options = {"mode": "truncate", "level": level, "low": 0.0, "high": 1e9}
    weights_BS = importance_weights(logprobs_BS, rollout_logprobs_BS, mask_BS, **options)
    assert weights_BS[1].tolist() == [0.0] * 4
    for row in (0, 2):
        length = int(mask_BS[row].sum())
        alone_BS = importance_weights(
            logprobs_BS[row, None, :length],
            rollout_logprobs_BS[row, None, :length],
            torch.ones(1, length),
            **options,
        )
        torch.testing.assert_close(weights_BS[row, :length], alone_BS[0])


def test_truncate_bounds_one_side_and_mask_both_sides():
    ratios_BS = f64([[0.25, 0.5, 1.0, 2.0, 4.0]])
    arguments = (ratios_BS.log(), torch.zeros_like(ratios_BS), torch.ones_like(ratios_BS))
    bounds = {"level": "token", "low": 0.4999, "high": 2.0001}
    masked_BS = importance_weights(*arguments, mode="mask", **bounds)
    torch.testing.assert_close(masked_BS, f64([[0.0, 0.5, 1.0, 2.0, 0.0]]))
    truncated_BS = importance_weights(*arguments, mode="truncate", **bounds)
    torch.testing.assert_close(truncated_BS, f64([[0.25, 0.5, 1.0, 2.0, 2.0001]]))


def test_mode_none_is_ones_on_the_mask():
    mask_BS = torch.tensor([[True, True, False]])
    weights_BS = importance_weights(
        f64([[-1.0, -2.0, -3.0]]),
        f64([[-3.0, -2.0, -1.0]]),
        mask_BS,
        mode="none",
        level="token",
        low=0.5,
        high=2.0,
    )
    assert weights_BS.tolist() == [[1.0, 1.0, 0.0]] and weights_BS.dtype == torch.float64


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_log_ratio_is_bounded(level):
    options = {"mode": "truncate", "level": level, "low": 0.0, "high": 1e30}
    weights_BS = importance_weights(
        torch.tensor([[-0.5]]), torch.tensor([[-1000.0]]), torch.ones(1, 1), **options
    )
    torch.testing.assert_close(weights_BS, torch.tensor([[20.0]]).exp())


# -------------------------------------------------------------------------------------- house rules


def importance(**options):
    options = {"mode": "mask", "level": "token", "low": 0.5, "high": 2.0} | options
    return importance_weights(*torch.zeros(3, 2, 2), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: divergence(*torch.zeros(2, 1, 3), kind="kl"),
            "kind='kl': choose one of forward_kl, reverse_kl, jsd",
        ),
        (
            lambda: divergence(*torch.zeros(2, 1, 3), kind="jsd", jsd_beta=1.0),
            "jsd_beta=1.0.*reverse_kl",
        ),
        (
            lambda: divergence(*torch.zeros(2, 1, 3), kind="skew_reverse_kl", skew_alpha=0.0),
            "skew_alpha=0.0",
        ),
        (lambda: divergence(*torch.zeros(2, 1, 3), kind="jsd", temperature=0.0), "temperature=0.0"),
        (
            lambda: support_divergence(*torch.zeros(2, 1, 3), kind="x", tail="bucket"),
            "kind='x': choose one of",
        ),
        (
            lambda: support_divergence(*torch.zeros(2, 1, 3), kind="jsd", tail="x"),
            "tail='x': choose one of bucket",
        ),
        (
            lambda: kl_estimate(*torch.zeros(2, 3), estimator="k4"),
            "estimator='k4': choose one of k1, k2, k3",
        ),
        (lambda: importance(mode="x"), "mode='x': choose one of none, truncate, mask"),
        (lambda: importance(level="x"), "level='x': choose one of token, sequence, geometric"),
        (
            lambda: policy_gradient_loss(*torch.zeros(3, 2), clip_low=0.2, dual_clip=1.0),
            "dual_clip=1.0",
        ),
        (lambda: distillation_advantage(*torch.zeros(2, 2), clip=0.0), "clip=0.0"),
    ],
)
def test_a_wrong_choice_is_one_line_that_names_it(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def every_call():
    for kind in DIVERGENCES:
        yield lambda a, b, _, kind=kind: divergence(a, b, kind=kind, temperature=1.0)
        for tail in TAILS:
            yield lambda a, b, _, kind=kind, tail=tail: support_divergence(
                a, b, kind=kind, tail=tail
            )
    for estimator in ESTIMATORS:
        yield lambda a, b, _, estimator=estimator: kl_estimate(a, b, estimator=estimator)
    for mode, level in itertools.product(IMPORTANCE_MODES, IMPORTANCE_LEVELS):
        options = {"mode": mode, "level": level, "low": 0.5, "high": 2.0}
        yield lambda a, b, c, options=options: importance_weights(a, b, c, **options)
    yield lambda a, b, _: distillation_advantage(a, b, clip=0.1)
    yield lambda a, b, c: policy_gradient_loss(a, b, c, clip_low=0.2, clip_high=0.2, dual_clip=3.0)


def test_no_function_writes_to_its_arguments():
    logprobs, other_logprobs = (
        randn(3, 4).log_softmax(-1) - 0.1,
        randn(3, 4, seed=1).log_softmax(-1) - 0.1,
    )
    arguments = (logprobs, other_logprobs, (randn(3, 4) > 0).double())
    copies = [argument.clone() for argument in arguments]
    for call in every_call():
        call(*arguments)
    for argument, copy in zip(arguments, copies, strict=True):
        assert argument._version == 0
        assert torch.equal(argument, copy)
