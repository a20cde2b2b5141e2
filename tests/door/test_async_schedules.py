"""The bound on staleness, and that nothing is lost or waited for in vain, over schedules of a clock
that is not real.

Neither sockets nor threads: servers are a heap of events. What is asked gets its answer after a
delay of hypothesis' choosing, in which weights may have been pushed; the trainer takes time too.
"""

import heapq
import itertools
from concurrent.futures import Future

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.async_rollout import AsyncRolloutEngine
from opd.clients.rollout_servers import Answer, Flow
from opd.clients.wire import Logprobs
from opd.config import AsyncConfig, RolloutConfig
from tests.support.scripted_server import P, ids_of, prompts_of

G, L = 2, 4


class Clock:
    """Events by time; `version` is that of the weights which the servers have."""

    def __init__(self):
        self.now, self.version, self.events, self._count = 0.0, 0, [], itertools.count()

    def at(self, delay: float, act) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self._count), act))

    def run(self, *, until=lambda: False, seconds: float = float("inf")) -> None:
        """Lets time pass, until a condition holds or for so long."""
        end = self.now + seconds
        while not until() and self.events and self.events[0][0] <= end:
            self.now, _, act = heapq.heappop(self.events)
            act()
        if seconds < float("inf"):
            self.now = end


class Servers:
    """Rollout servers and their pool in one.

    Of a response, each token is of the weights of its moment.
    """

    def __init__(self, clock: Clock, delays, cut_off: set[str]):
        self.clock, self.delays, self.cut_off, self.flow, self.oldest = (
            clock,
            delays,
            cut_off,
            Flow(),
            0,
        )
        self.pool, self.excused, self.asked = self, False, []

    def submit(
        self, name, prompt_ids, *, seed, temperature, with_logprobs, oldest, images=None
    ) -> Future:
        future, versions = Future(), []
        self.asked.append((name, self.clock.version))
        step = self.delays(name) / L

        def write() -> None:
            versions.append(self.clock.version)
            if len(versions) == 2 and name in self.cut_off:
                self.cut_off.discard(name)
                future.set_result(Answer([5], "aborted", [(versions[0], 0, 1)], [-1.0]))
            elif len(versions) < L:
                self.clock.at(step, write)
            else:
                spans, start = [], 0
                for version, group in itertools.groupby(versions):
                    end = start + len(list(group))
                    spans.append((version, start, end))
                    start = end
                assert min(versions) >= oldest, "a real server's answer would have been refused"
                future.set_result(Answer([7] * L, "length", spans, [-1.0] * L))

        self.clock.at(step, write)
        return future

    def collect(self, futures):
        self.clock.run(until=lambda: all(future.done() for future in futures))
        assert all(future.done() for future in futures), "a step waits for what never comes"
        return [future.result(timeout=0) for future in futures]

    def close(self) -> None:
        pass


class LogprobServers(Servers):
    def submit(self, rollout, *, oldest) -> Future:
        future = Future()

        def answer() -> None:
            assert self.clock.version >= oldest
            future.set_result(Logprobs(-torch.ones(L), torch.ones(L), self.clock.version))

        self.clock.at(self.delays(rollout.sample_id), answer)
        return future


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    max_staleness=st.integers(0, 4),
    sync_every=st.integers(1, 4),
    steps=st.integers(1, 8),
    judged=st.booleans(),
)
def test_the_bound_holds_whatever_takes_how_long(data, max_staleness, sync_every, steps, judged):
    max_staleness = max(max_staleness, sync_every - 1)
    slow = data.draw(
        st.dictionaries(st.sampled_from(ids_of(range(steps))), st.floats(0, 50), max_size=10)
    )
    busy = data.draw(st.lists(st.floats(0, 5), min_size=steps, max_size=steps))
    cut_off = set(data.draw(st.lists(st.sampled_from(ids_of(range(steps))), max_size=3)))
    clock = Clock()

    def delays(name: str) -> float:
        return slow.get(name.replace("-", "/"), 1.0)

    def push(named_parameters, version):
        clock.run(seconds=0.5)  # servers go on writing while weights are gathered
        clock.version = version
        return {}

    servers = Servers(clock, delays, {name.replace("/", "-") for name in cut_off})
    engine = AsyncRolloutEngine(
        servers,
        RolloutConfig(num_generations=G, max_response_tokens=L),
        AsyncConfig(max_staleness=max_staleness, sync_every=sync_every),
        seed=0,
        num_steps=steps,
        prompts_of=prompts_of,
        push=push,
        logprob_servers=LogprobServers(clock, delays, set()) if judged else None,
    )
    heard, trained = set(), []
    engine.load_weights([], 0)
    for step in range(steps):
        rollouts = engine.generate(
            prompts_of(step), step, on_finished=lambda rollout: heard.add(rollout.sample_id)
        )
        for rollout in rollouts:
            assert all(
                0 <= step - version <= max_staleness for version, _, _ in rollout.policy_spans
            )
            assert rollout.sample_id in heard, "its teachers have not been asked"
            if judged:
                assert rollout.policy_version <= rollout.old_policy.version <= step
        trained += rollouts
        clock.run(seconds=busy[step])
        engine.load_weights([], step + 1)
    assert [rollout.sample_id for rollout in trained] == ids_of(
        range(steps)
    ) and engine.in_flight == engine.ready == 0
    times = [name for name, _ in servers.asked]
    assert len(times) == steps * P * G + len(
        cut_off - {name.replace("-", "/") for name in servers.cut_off}
    )
    if max_staleness == 0:
        assert [int(name.split("-")[0]) for name, _ in servers.asked] == [
            version for _, version in servers.asked
        ]
