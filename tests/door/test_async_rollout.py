"""The engine that runs ahead: order, the bound on staleness, what is done with text that is cut off
or too old.

The server here is scripted: real sockets, responses that are a function of the seed, delays of the
test's choosing.
"""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.async_rollout import AsyncRolloutEngine
from opd.clients.health import Limits
from opd.clients.logprob_servers import LogprobServers
from opd.clients.rollout_servers import RolloutServers
from opd.config import AsyncConfig, RolloutConfig
from opd.rollout import sample_seed
from tests.support.scripted_server import (
    EOS,
    VOCAB,
    G,
    P,
    Scripted,
    ids_of,
    prompts_of,
    serving,
    until,
)


@pytest.fixture
def server():
    with serving(Scripted()) as script:
        yield script


@pytest.fixture(scope="module")
def server_forever():
    with serving(Scripted()) as script:
        yield script


def engine_of(
    script: Scripted,
    *,
    num_steps: int = 6,
    max_staleness: int = 1,
    sync_every: int = 1,
    with_logprobs: bool = False,
    longest: int = 6,
    **ahead,
):
    pushed = []

    def push(named_parameters, version):
        pushed.append(version)
        script.version = version
        return {"bytes": 1}

    cfg = RolloutConfig(num_generations=G, max_response_tokens=longest)
    ahead = AsyncConfig(max_staleness=max_staleness, sync_every=sync_every, **ahead)
    limits = Limits(wait_s=ahead.rollout_wait_s, max_inflight=ahead.max_inflight)
    engine = AsyncRolloutEngine(
        RolloutServers([script.url], cfg, ahead, eos_ids=(EOS,), vocab=VOCAB, token=None),
        cfg,
        ahead,
        seed=7,
        num_steps=num_steps,
        prompts_of=prompts_of,
        push=push,
        logprob_servers=LogprobServers([script.url], None, limits) if with_logprobs else None,
    )
    engine.pushed = pushed
    return engine


def train(engine: AsyncRolloutEngine, steps: range, hear=None) -> list[list]:
    """The loop without a student: every step's rollouts, a push after each."""
    engine.load_weights([], steps.start)
    taken = []
    for step in steps:
        taken.append(engine.generate(prompts_of(step), step, on_finished=hear))
        for rollout in taken[-1]:
            assert 0 <= step - rollout.policy_version <= engine.ahead.max_staleness
        engine.load_weights([], step + 1)
    return taken


def test_samples_come_in_the_order_and_with_the_seeds_of_the_synchronous_engine(server):
    engine = engine_of(server)
    heard = []
    rollouts = [r for step in train(engine, range(6), heard.append) for r in step]
    engine.close()
    assert [r.sample_id for r in rollouts] == ids_of(range(6))
    # each once, those that came early too
    assert sorted(r.sample_id for r in heard) == sorted(ids_of(range(6)))
    for rollout in rollouts:
        step, place, g = map(int, rollout.sample_id.split("/"))
        body = server.bodies[rollout.sample_id.replace("/", "-")]
        assert body["prompt_ids"] == rollout.prompt.token_ids == prompts_of(step)[place].token_ids
        assert body["seed"] == sample_seed(7, step, prompts_of(step)[place], place, g)


def test_nothing_runs_ahead_without_staleness(server):
    engine = engine_of(server, max_staleness=0)
    rollouts = [r for step in train(engine, range(4)) for r in step]
    engine.close()
    assert [r.policy_version for r in rollouts] == [step for step in range(4) for _ in range(P * G)]
    order = [int(name.split("-")[0]) for name, _ in server.log]
    assert order == sorted(order)


@settings(max_examples=12, deadline=None)
@given(
    max_staleness=st.integers(0, 3),
    sync_every=st.integers(1, 3),
    steps=st.integers(1, 7),
    slow=st.dictionaries(st.sampled_from(ids_of(range(7))), st.floats(0, 0.15), max_size=8),
)
def test_the_bound_holds_and_nothing_is_lost_whatever_the_delays(
    server_forever, max_staleness, sync_every, steps, slow
):
    max_staleness = max(max_staleness, sync_every - 1)
    server_forever.delays = {name.replace("/", "-"): seconds for name, seconds in slow.items()}
    engine = engine_of(
        server_forever, num_steps=steps, max_staleness=max_staleness, sync_every=sync_every
    )
    try:
        rollouts = [r for step in train(engine, range(steps)) for r in step]  # asserts the bound
        assert [r.sample_id for r in rollouts] == ids_of(range(steps))
        assert engine.pushed == [
            v for v in range(steps + 1) if v == 0 or v % sync_every == 0 or v == steps
        ]
    finally:
        engine.close()


def long_tailed(rng: random.Random, most: int) -> int:
    return min(most, int(rng.paretovariate(0.8)))


def test_lengths_that_are_trained_on_are_those_that_were_sampled(server):
    """Long responses take long here; with any-finished-first they would come late or never, and
    short ones twice as often.
    """
    server.length, server.seconds_per_token = long_tailed, 0.005
    trained = {}
    for max_staleness in (0, 3):
        server.lengths.clear()
        engine = engine_of(server, max_staleness=max_staleness, longest=60)
        trained[max_staleness] = [
            [len(r.response_ids) for r in step] for step in train(engine, range(6))
        ]
        finished, _ = engine.servers.flow.take()
        engine.close()
        flat = sorted(length for step in trained[max_staleness] for length in step)
        assert flat == sorted(server.lengths) == sorted(finished)
        assert flat[-1] > 10 * flat[len(flat) // 2], "no long tail"
    assert trained[0] == trained[3]  # step by step: the long ones are not put off


def test_text_that_a_push_cut_off_is_written_again(server):
    server.first_answers["0-1-0"] = {
        "finish_reason": "aborted",
        "token_ids": [5],
        "spans": [[0, 0, 1]],
    }
    engine = engine_of(server, num_steps=2)
    rollouts = [r for step in train(engine, range(2)) for r in step]
    engine.close()
    assert [name for name, _ in server.log].count("0-1-0") == 2
    again = rollouts[2]
    assert (
        again.sample_id == "0/1/0" and again.finish_reason == "length" and again.response_ids != [5]
    )


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        ({"token_ids": [VOCAB], "spans": [[0, 0, 1]], "logprobs": [-1.0]}, "vocabulary"),
        ({"logprobs": None}, "log-probability"),
        ({"token_ids": [3, 4], "spans": [[0, 0, 2]], "logprobs": [-1.0, 0.5]}, "log-probability"),
        ({"spans": []}, "spans"),
        ({"token_ids": [3, 4], "logprobs": [-1.0, -1.0], "spans": [[0, 0, 1], [1, 2, 2]]}, "spans"),
        ({"token_ids": [], "spans": [], "logprobs": []}, "0 tokens"),
        ({"token_ids": [3], "logprobs": [-1.0], "spans": [[-5, 0, 1]]}, "missed a push"),
        ({"finish_reason": "tool_calls"}, "tool_calls"),
        ({"token_ids": "text"}, "not a response"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_cannot_be_believed_is_asked_for_again(server, spoiled, why):
    server.first_answers["1-0-1"] = spoiled
    engine = engine_of(server, num_steps=2)
    rollouts = [r for step in train(engine, range(2)) for r in step]
    stats, error = engine.servers.pool.take_stats(), engine.servers.pool.replicas[0].last_error
    engine.close()
    assert [r.sample_id for r in rollouts] == ids_of(range(2))
    assert stats.failures["answer"] == 1 and why in error


def state_when_all_but_one_are_ready(engine: AsyncRolloutEngine) -> dict:
    """What a checkpoint then has; the engine is closed."""
    until(lambda: engine.ready == P * G - 1)
    state = json.loads(json.dumps(engine.state()))
    engine.close()
    return state


def test_a_checkpoint_keeps_what_is_finished_and_names_what_is_not(server):
    server.delays["1-2-1"] = 30.0  # of the step after the one that is trained on
    engine = engine_of(server, num_steps=4)
    engine.load_weights([], 0)
    engine.generate(prompts_of(0), 0)
    state = state_when_all_but_one_are_ready(engine)
    assert [row["id"] for row in state["finished"]] == ids_of(range(1, 2))[:-1]
    assert state["in_flight"] == ["1/2/1"]

    asked_before = len(server.log)
    server.delays.clear()
    resumed = engine_of(server, num_steps=4)
    resumed.restore(state)
    heard = []
    rollouts = [r for step in train(resumed, range(1, 4), heard.append) for r in step]
    resumed.close()
    assert [r.sample_id for r in rollouts] == ids_of(range(1, 4))
    kept = {row["id"]: row for row in state["finished"]}
    for rollout in rollouts[: P * G - 1]:
        assert rollout.response_ids == kept[rollout.sample_id]["response_ids"]
        assert [list(span) for span in rollout.policy_spans] == kept[rollout.sample_id]["spans"]
    asked = [name for name, _ in server.log[asked_before:]]
    assert "1-2-1" in asked and not {name.replace("/", "-") for name in kept} & set(asked)
    assert sorted(r.sample_id for r in heard) == sorted(ids_of(range(1, 4)))


def test_a_rank_takes_its_own_of_what_any_number_of_ranks_have_kept(server, tmp_path):
    server.delays["1-2-1"] = 30.0
    engine = engine_of(server, num_steps=4)
    engine.load_weights([], 0)
    engine.generate(prompts_of(0), 0)
    rows = state_when_all_but_one_are_ready(engine)["finished"]
    for rank in range(2):  # the places of two ranks, read by one
        mine = [row for row in rows if int(row["id"].split("/")[1]) % 2 == rank]
        assert mine
        (tmp_path / f"buffer_rank_{rank}.json").write_text(json.dumps({"finished": mine}))
    server.delays.clear()
    resumed = engine_of(server, num_steps=4)
    resumed.load(tmp_path)
    assert sorted(resumed._restored) == sorted(row["id"] for row in rows)
    fewer = engine_of(server, num_steps=4)
    fewer.prompts_of = lambda step: prompts_of(step)[:1]  # of three ranks, say: place 0 is its own
    fewer.load(tmp_path)
    assert {name.split("/")[1] for name in fewer._restored} == {"0"}
    for engine in (resumed, fewer):
        engine.close()


def test_greedy_answers_for_an_evaluation_do_not_disturb_the_order(server):
    engine = engine_of(server, num_steps=2)
    engine.load_weights([], 0)
    greedy = engine.generate_greedily(prompts_of(0))
    assert [r.sample_id for r in greedy] == [f"greedy/{p.prompt_id}/0" for p in prompts_of(0)]
    assert server.bodies["greedy-0"]["temperature"] == 0.0
    assert [r.sample_id for r in engine.generate(prompts_of(0), 0)] == ids_of(range(1))
    engine.close()


def test_a_server_that_is_gone_is_named(server):
    engine = engine_of(server, rollout_wait_s=1.0)
    server.url = "http://127.0.0.1:1"
    gone = engine_of(server, rollout_wait_s=1.0)
    engine.close()
    gone.load_weights([], 0)
    with pytest.raises(
        RuntimeError, match=r"rollout: no answer for .* http://127.0.0.1:1: cannot connect"
    ):
        gone.generate(prompts_of(0), 0)
    gone.close()


def is_judged(rollout) -> bool:
    L = len(rollout.response_ids)
    old = rollout.old_policy
    return old.logprobs == [-t - 1.0 for t in range(L)] and old.entropy == [
        float(t) for t in range(L)
    ]


def test_the_old_policy_is_part_of_a_sample(server):
    """Asked for as soon as a response is finished; not older than the sampler; once for each
    sample.
    """
    server.late["logprobs-2-0-0"] = 2  # a server that missed pushes
    engine, heard = engine_of(server, num_steps=3, with_logprobs=True), []
    rollouts = [r for step in train(engine, range(3), heard.append) for r in step]
    stats = engine.logprob_servers.pool.take_stats()
    engine.close()
    assert [r.sample_id for r in rollouts] == ids_of(range(3)) and all(map(is_judged, rollouts))
    assert all(r.old_policy.version >= r.policy_version for r in rollouts)
    assert {r.sample_id for r in heard} == set(ids_of(range(3)))
    assert sorted(server.judged) == sorted(
        [name.replace("/", "-") for name in ids_of(range(3))] + ["2-0-0"]
    )
    assert stats.failures == {"answer": 1}


def test_a_checkpoint_keeps_the_old_policy(server):
    server.delays["1-2-1"] = 30.0
    engine = engine_of(server, num_steps=3, with_logprobs=True)
    engine.load_weights([], 0)
    engine.generate(prompts_of(0), 0)
    state = state_when_all_but_one_are_ready(engine)
    server.delays.clear()
    asked_before = len(server.judged)
    resumed = engine_of(server, num_steps=3, with_logprobs=True)
    resumed.restore(state)
    rollouts = [r for step in train(resumed, range(1, 3)) for r in step]
    resumed.close()
    assert all(map(is_judged, rollouts)) and [
        r.old_policy.version for r in rollouts[: P * G - 1]
    ] == [0] * (P * G - 1)
    # the next step's, and the one that was not finished
    assert len(server.judged) - asked_before == P * G + 1


def test_log_prob_servers_that_are_gone_are_named(server):
    engine = engine_of(server, rollout_wait_s=1.0, with_logprobs=True)
    engine.logprob_servers.pool.close()
    engine.logprob_servers = LogprobServers(["http://127.0.0.1:1"], None, Limits(wait_s=1.0))
    engine.pools[1] = engine.logprob_servers.pool
    engine.load_weights([], 0)
    with pytest.raises(
        RuntimeError, match=r"log-prob servers: no answer for .* http://127.0.0.1:1: cannot connect"
    ):
        engine.generate(prompts_of(0), 0)
    engine.close()


def test_flow_counts_idle_time_and_lengths(server):
    engine = engine_of(server, num_steps=2, max_staleness=0)
    engine.load_weights([], 0)
    rollouts = engine.generate(prompts_of(0), 0)
    lengths, _ = engine.servers.flow.take()
    time.sleep(0.05)
    nothing, idle = engine.servers.flow.take()
    server.delays = dict.fromkeys([name.replace("/", "-") for name in ids_of(range(2))], 0.3)
    engine.load_weights([], 1)
    engine.generate(prompts_of(1), 1)
    _, busy = engine.servers.flow.take()
    engine.close()
    assert sorted(lengths) == sorted(len(r.response_ids) for r in rollouts) and nothing == []
    assert idle == 1.0 and busy < 0.5
