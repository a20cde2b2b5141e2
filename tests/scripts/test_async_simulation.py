"""The simulation of asynchronous training keeps its promises: nothing lost, the bound held, times
that a hand can compute.
"""

import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import bench_async
from scripts.measure.async_model import (
    Rates,
    Rule,
    Split,
    Workload,
    decode_times,
    lognormal_lengths,
    synchronous,
)
from scripts.measure.async_simulation import asynchronous, choose, promising, splits

RATES = Rates(
    decode_a=7e-3, decode_b=1.2e-4, max_batch=64, score=3e-5, train=1.5e-4, publish=3.0, load=3.0
)
SPLIT = Split(rollout=4, teacher=1, trainer=3)
# only decoding takes time
FREE = Rates(decode_a=1.0, decode_b=0.0, max_batch=10**6, score=0.0, train=0.0)


def long_tailed(batch: int = 64, steps: int = 20, seed: int = 0) -> Workload:
    """Three times as many responses as strict order trains on."""
    return Workload(
        lognormal_lengths(3 * batch * steps, 5000, 1.0, 32_768, seed), batch, steps, 512
    )


def constant(length: int, batch: int, steps: int, prompt: int = 0) -> Workload:
    return Workload(np.full(4 * batch * steps, length), batch, steps, prompt)


# ---- What must always hold -----------------------------------------------------------------------


@st.composite
def schedules(draw):
    """Any workload, rates, split and strict rule, small."""
    batch, steps = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    lengths = np.array(
        draw(st.lists(st.integers(1, 400), min_size=batch * steps, max_size=batch * steps))
    )
    cost = st.floats(0, 0.1)
    rates = Rates(
        decode_a=draw(st.floats(1e-3, 0.1)),
        decode_b=draw(cost),
        max_batch=draw(st.integers(1, 6)),
        score=draw(cost),
        train=draw(cost),
        logprob=draw(cost),
        publish=draw(st.floats(0, 20)),
        load=draw(st.floats(0, 20)),
    )
    split = Split(*(draw(st.integers(1, 4)) for _ in range(3)), logprob=draw(st.integers(0, 2)))
    sync_every = draw(st.integers(1, 3))
    rule = Rule(
        max_staleness=draw(st.integers(sync_every - 1, 4)),
        sync_every=sync_every,
        waves=draw(st.integers(1, 4)),
        at_push=draw(st.sampled_from(["keep", "drain", "restart"])),
    )
    return Workload(lengths, batch, steps, draw(st.integers(0, 20))), rates, split, rule


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_sample_is_trained_once_in_order_and_never_too_stale(schedule):
    work, rates, split, rule = schedule
    run = asynchronous(work, rates, split, rule)
    assert [index for step in run.trained for index in step] == list(range(work.batch * work.steps))
    assert run.dropped == 0 and run.staleness.total() == work.batch * work.steps
    assert min(run.staleness) >= 0 and max(run.staleness) <= rule.max_staleness
    assert (run.restarts == 0) or rule.at_push == "restart"
    for fraction in (run.trainer_idle, run.trainer_publishing, run.rollout_idle):
        assert -1e-9 <= fraction <= 1 + 1e-9
    # No role does its work faster than its GPUs allow.
    tokens = sum(work.tokens(index) for index in range(work.batch * work.steps))
    assert run.seconds >= tokens * rates.train / split.trainer * (1 - 1e-9)
    assert run.seconds >= tokens * rates.score / split.teacher * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_finished_first_trains_nothing_twice(schedule):
    work, rates, split, _ = schedule
    work = replace(work, lengths=np.tile(work.lengths, 20))
    run = asynchronous(work, rates, split, Rule(1, order="finished"))
    trained = [index for step in run.trained for index in step]
    assert len(set(trained)) == len(trained) == work.batch * work.steps


def test_a_run_is_a_function_of_its_arguments():
    first, second = (asynchronous(long_tailed(), RATES, SPLIT, Rule(2)) for _ in range(2))
    assert first == second
    assert first.seconds != asynchronous(long_tailed(seed=1), RATES, SPLIT, Rule(2)).seconds


# ---- What a hand can compute ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [16, 64, 250])
def test_without_staleness_it_is_the_split_synchronous_run(batch):
    work = long_tailed(batch, steps=4)
    split = Split(4, 1, 2, logprob=1)
    rates = replace(RATES, logprob=4e-5)
    run, expected = (
        asynchronous(work, rates, split, Rule(0, waves=1, trainer_waits=False)),
        synchronous(work, rates, split),
    )
    assert run.seconds == pytest.approx(expected.seconds, rel=1e-9)
    # While replicas load, this trainer waits; the synchronous run counts that as part of the push.
    assert run.trainer_idle == pytest.approx(expected.trainer_idle + rates.load * 3 / run.seconds)
    assert (run.trained, run.staleness) == (expected.trained, expected.staleness)


def test_one_replica_decodes_its_share_as_computed():
    rates = replace(FREE, decode_a=0.5, decode_b=0.25)
    # Four run until token 2 (1.5 s each), two until 5 (1 s), one until 9 (0.75 s).
    assert decode_times(np.array([9, 2, 5, 2]), rates).tolist() == [9.0, 3.0, 6.0, 3.0]
    # Two places: the third starts when the second ends at token 2.
    assert decode_times(np.array([9, 2, 5]), replace(rates, max_batch=2)).tolist() == [
        8.5,
        2.0,
        7.0,
    ]


def test_constant_lengths_have_a_closed_form():
    length, batch, prompt, steps = 100, 8, 20, 30
    work, rates = (
        constant(length, batch, steps, prompt),
        Rates(1e-2, 1e-3, 64, score=1e-3, train=1e-3, publish=1, load=1),
    )
    decode = length * (1e-2 + 1e-3 * batch / 4)  # eight on four replicas
    score, train = batch * (length + prompt) * 1e-3, batch * (length + prompt) * 1e-3 / 3
    push = (steps - 1) * 2.0
    assert synchronous(work, rates, SPLIT).seconds == pytest.approx(
        steps * (decode + score + train) + push
    )
    eight = length * (1e-2 + 1e-3) + batch * (length + prompt) * (1e-3 + 1e-3) / 8
    assert synchronous(work, rates, 8).seconds == pytest.approx(steps * eight + push)


def test_a_slow_trainer_never_waits_but_for_the_first_batch():
    work, rates = constant(100, 8, 30), Rates(1e-3, 0.0, 64, score=0.0, train=1e-2)
    run = asynchronous(work, rates, Split(4, 1, 1), Rule(1))
    assert run.seconds == pytest.approx(100 * 1e-3 + 30 * 8 * 100 * 1e-2)
    assert run.trainer_idle == pytest.approx(0.1 / run.seconds)


def test_where_only_decoding_takes_time_staleness_overlaps_the_longest_responses():
    lengths = np.tile([10, 1], 6)  # B = 2, one replica without limits: a step takes 10 alone
    work, split = Workload(lengths, 2, 6), Split(1, 1, 1)
    assert synchronous(work, FREE, split).seconds == pytest.approx(60)
    assert asynchronous(work, FREE, split, Rule(0)).seconds == pytest.approx(60)
    # two steps at a time
    assert asynchronous(work, FREE, split, Rule(1)).seconds == pytest.approx(30)
    assert asynchronous(work, FREE, split, Rule(5)).seconds == pytest.approx(10)  # all of them


def test_a_restart_pays_for_its_tokens_again_and_a_drain_waits():
    """The response of step 1 is half written when the first push comes, at 10 s."""
    work, split, rates = Workload(np.array([10, 20]), 1, 2), Split(1, 1, 1), replace(FREE, load=1.0)
    rules = {at: Rule(1, at_push=at, trainer_waits=False) for at in ("keep", "drain", "restart")}
    ends = {at: asynchronous(work, rates, split, rule).seconds for at, rule in rules.items()}
    assert ends == pytest.approx({"keep": 21, "drain": 20, "restart": 31})


# ---- What it is for ------------------------------------------------------------------------------


def test_more_staleness_and_faster_parts_are_never_slower():
    work = long_tailed()
    seconds = [asynchronous(work, RATES, SPLIT, Rule(bound)).seconds for bound in range(5)]
    assert all(later <= 1.02 * earlier for earlier, later in pairwise(seconds))
    assert seconds[4] < 0.8 * seconds[0]
    for faster in ({"decode_a": 3e-3}, {"train": 1e-4}, {"score": 1e-5}, {"load": 0.0}):
        assert (
            asynchronous(work, replace(RATES, **faster), SPLIT, Rule(2)).seconds
            <= 1.001 * seconds[2]
        ), faster


def test_strict_order_trains_the_sampled_lengths_and_its_rival_the_short_ones():
    work = long_tailed(64, 30)
    strict = asynchronous(work, RATES, SPLIT, Rule(2))
    rival = asynchronous(work, RATES, SPLIT, Rule(2, order="finished", drop_stale=True))

    def mean(run):
        return work.lengths[[index for step in run.trained for index in step]].mean()

    sampled = work.lengths[: 64 * 30]
    assert mean(strict) == sampled.mean()
    assert mean(rival) < 0.95 * sampled.mean() and rival.dropped > 0
    kept = asynchronous(work, RATES, SPLIT, Rule(2, order="finished"))
    assert max(kept.staleness) > 2, "without dropping, long responses are older than any bound"


def test_the_tail_is_what_it_is_said_to_be():
    lengths = lognormal_lengths(200_000, 5000, 1.0, 10**6, seed=3)
    assert lengths.mean() == pytest.approx(5000, rel=0.02)
    assert np.percentile(lengths, 99) / np.median(lengths) == pytest.approx(np.exp(2.326), rel=0.05)
    assert lognormal_lengths(3, 5000, 0.0, 10**6, seed=3).tolist() == [5000] * 3
    assert lognormal_lengths(10_000, 5000, 1.0, 8000, seed=3).max() == 8000


def test_a_choice_keeps_the_bound_on_idle_trainers_if_any_split_does():
    work, options = long_tailed(64, 15), {"staleness": (2, 4), "batches": (64,)}
    rates = replace(RATES, train=6e-4)
    candidates = promising(splits(8), work, rates, 8)
    assert len(splits(8)) == 21 and all(split.gpus == 8 for split in splits(8))
    assert all(split.gpus == 1024 for split in splits(1024)) and all(
        s.gpus == 16 for s in splits(16, logprob=True)
    )
    free = choose(work, rates, candidates, **options)
    bound = choose(work, rates, candidates, max_trainer_idle=0.3, **options)
    assert bound.result.trainer_idle < 0.3
    assert free.result.seconds <= 1.02 * bound.result.seconds
    hopeless = choose(work, rates, candidates, max_trainer_idle=0.0, **options)
    assert hopeless.result.seconds == free.result.seconds


def test_a_trainer_that_waits_for_its_servers_pays_for_each_of_them_in_turn():
    """Decoding takes no time here: a step is training, writing the weights, and a load for each
    replica.
    """
    work, split = constant(1, 8, 5), Split(3, 1, 1)
    rates = Rates(
        decode_a=1e-9, decode_b=0.0, max_batch=64, score=0.0, train=1e-2, publish=1.0, load=2.0
    )
    step, push = 8 * 1e-2, 1.0 + 3 * 2.0
    run = asynchronous(work, rates, split, Rule(1, waves=3, trainer_waits=True))
    assert run.ended == pytest.approx([step + i * (step + push) for i in range(5)])
    assert run.trainer_publishing == pytest.approx(4 * push / run.seconds)
    together = asynchronous(work, rates, split, Rule(1, waves=1, trainer_waits=True))
    assert together.seconds == pytest.approx(5 * step + 4 * 3.0)
    assert asynchronous(
        work, rates, split, Rule(4, waves=3, trainer_waits=False)
    ).seconds == pytest.approx(5 * step + 4 * 1.0)
    assert asynchronous(long_tailed(), RATES, SPLIT, Rule(2, waves=4)).seconds > 1.02 * (
        asynchronous(long_tailed(), RATES, SPLIT, Rule(2, trainer_waits=False)).seconds
    )


@pytest.mark.parametrize("split", [8, Split(4, 1, 3)])
def test_ends_of_steps_are_those_of_a_shorter_run(split):
    work = long_tailed(64, 6)
    whole = synchronous(work, RATES, split)
    assert whole.ended == pytest.approx(
        [synchronous(replace(work, steps=steps), RATES, split).seconds for steps in range(1, 7)]
    )


def test_rules_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="below sync_every - 1"):
        Rule(1, sync_every=3)
    with pytest.raises(ValueError, match="no such rule"):
        Rule(1, at_push="abort")
    with pytest.raises(ValueError, match="more lengths"):
        asynchronous(Workload(np.ones(3), 2, 2), FREE, Split(1, 1, 1), Rule(0, order="finished"))


# ---- The script ----------------------------------------------------------------------------------


def test_the_script_prints_the_figures(monkeypatch, capsys, tmp_path):
    plot = tmp_path / "async.png"
    monkeypatch.setattr(bench_async, "CANDIDATES", 1)
    monkeypatch.setattr(bench_async, "STALENESS", (4,))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench_async.py",
            "--json",
            "--gpus",
            "8",
            "--steps",
            "2",
            "--plot",
            str(plot),
            "--rates",
            '{"train": 1e-3}',
        ],
    )
    assert bench_async.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (line,) = result["sizes"]
    assert result["rates"] == {**asdict(bench_async.RATES), "train": 1e-3}
    assert result["speedup_simulated_8gpu"] == line["vs_colocated"] > 0
    assert result["trainer_idle_simulated"] == line["trainer_idle"]
    assert result["speedup_measured"] is None and result["trainer_idle_measured"] is None
    assert [row["max_staleness"] for row in result["staleness"]] == list(range(9))
    assert result["rules"][0]["trained_over_sampled"] == 1 and len(result["tails"]) == len(
        bench_async.TAILS
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
