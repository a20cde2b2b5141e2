"""The simulation of asynchronous training keeps its promises: nothing lost, the bound held, times
that a hand can compute; and it has no error on runs that are made of its own rates.
"""

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import bench_async
from scripts.measure import async_check
from scripts.measure.async_model import Rates, Rule, Split, Workload, decode_times, synchronous
from scripts.measure.async_runs import Measured, Setting
from scripts.measure.async_simulation import asynchronous

pytestmark = pytest.mark.long  # a research note, not what a run does

# only decoding takes time
FREE = Rates(decode_a=1.0, decode_b=0.0, max_batch=10**6, score=0.0, train=0.0)


@st.composite
def schedules(draw):
    """Any workload, rates, split and strict rule, small."""
    batch, steps = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    lengths = np.array(
        draw(st.lists(st.integers(1, 400), min_size=batch * steps, max_size=batch * steps))
    )
    cost, seconds = st.floats(0, 0.1), st.floats(0, 20)
    rates = Rates(
        decode_a=draw(st.floats(1e-3, 0.1)),
        decode_b=draw(cost),
        max_batch=draw(st.integers(1, 6)),
        score=draw(cost),
        train=draw(cost),
        publish=draw(seconds),
        load=draw(seconds),
    )
    split = Split(*(draw(st.integers(1, 4)) for _ in range(3)))
    rule = Rule(
        max_staleness=draw(st.integers(0, 4)),
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
def test_without_staleness_it_is_the_split_synchronous_run(schedule):
    work, rates, split, _ = schedule
    run = asynchronous(work, rates, split, Rule(0, waves=1, trainer_waits=False))
    expected = synchronous(work, rates, split)
    assert run.seconds == pytest.approx(expected.seconds, rel=1e-9)
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


SETTING = Setting(steps=12, prompts=8, max_response_tokens=64)
RATES = Rates(
    decode_a=4e-3, decode_b=2e-4, max_batch=24, score=1e-4, train=6e-4, publish=0.05, load=0.02
)


def simulated(rates: Rates) -> Measured:
    """An asynchronous run that took what the simulation says."""
    lengths_IB = np.random.default_rng(0).geometric(1 / 12, size=(12, 8)).clip(max=64)
    work = Workload(lengths_IB.ravel(), SETTING.prompts, SETTING.steps, SETTING.prompt_tokens)
    rule = Rule(SETTING.max_staleness, waves=1, trainer_waits=True)
    run = asynchronous(work, async_check.by_the_trainer(rates), Split(1, 0, 1), rule)
    zeros_I = np.zeros(SETTING.steps)
    return Measured(np.diff(run.ended, prepend=0.0), {}, zeros_I, zeros_I, zeros_I, lengths_IB, 0.0)


def test_a_run_that_the_simulation_describes_has_no_error():
    run = simulated(RATES)
    expected = float(run.seconds_I[SETTING.window].mean())
    assert async_check.simulate("async", run, RATES, SETTING) == pytest.approx(expected, rel=1e-3)
    assert async_check.fit_decode(
        np.array([4, 4]), np.array([4, 8]), np.array([6, 8])
    ) == pytest.approx((1.0, 0.5))
    # What a line below zero would fit better
    assert async_check.fit_decode(np.array([4, 4]), np.array([4, 8]), np.array([8, 6]))[1] == 0
    assert async_check.fit_decode(np.array([4, 8]), np.array([8, 8]), np.array([8, 6]))[0] == 0


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
