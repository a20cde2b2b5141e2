"""A discrete-event simulation of asynchronous distillation, and the choice of a split of GPUs by
it.

Sample i belongs to step s(i) = i div B. It may be issued to a rollout replica whose weights have
version v >= s(i) - max_staleness, and step s trains on exactly its B samples; the version is the
number of optimizer steps done. `Rule(order="finished")` is the rival rule, whatever is finished
first, to be compared with.

Pure: everything follows from the arguments. All times are seconds, all lengths tokens.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from scripts.measure.async_model import Pool, Rates, Result, Rule, Split, Workload

FULL = 1 << 30  # the load of a replica that takes nothing new


class Replica:
    """A rollout server: a clock of tokens per sequence, and the marks at which its
    sequences end.
    """

    def __init__(self, rates: Rates):
        self.rates, self.running, self.clock, self.now = rates, [], 0.0, 0.0
        self.version, self.paused, self.draining, self.busy, self.stamp = 0, False, False, 0.0, 0

    def advance(self, now: float) -> None:
        """Decodes until `now`."""
        if self.running and not self.paused:
            self.clock += (now - self.now) / self.rates.token_seconds(len(self.running))
            self.busy += now - self.now
        self.now = now

    def next_end(self) -> float:
        """When its shortest rest is written, if nothing changes."""
        left = max(self.running[0][0] - self.clock, 0.0)
        return self.now + left * self.rates.token_seconds(len(self.running))

    def add(self, index: int, length: int) -> None:
        """Starts a response."""
        heapq.heappush(self.running, (self.clock + length, index))

    def pop_ended(self) -> list[int]:
        """What has just ended; rounding may have left the clock a little before the mark."""
        self.clock = max(self.clock, self.running[0][0])
        ended = []
        while self.running and self.running[0][0] <= self.clock + 1e-6:
            ended.append(heapq.heappop(self.running)[1])
        return ended


class Asynchronous:
    """The state of a run between two events. `run()` once."""

    def __init__(self, work: Workload, rates: Rates, split: Split, rule: Rule):
        self.work, self.rates, self.rule, self.trainers = work, rates, rule, split.trainer
        self.replicas = [Replica(rates) for _ in range(split.rollout)]
        self.teacher = Pool(split.teacher)
        waves = min(rule.waves, split.rollout)
        self.waves = [range(wave, split.rollout, waves) for wave in range(waves)]
        # What the dispatcher looks at, as arrays: thousands of replicas, and a look for every
        # response.
        self.load, self.version = (
            np.zeros(split.rollout, np.int64),
            np.zeros(split.rollout, np.int64),
        )
        self.events, self.count, self.now = [], 0, 0.0
        self.next_index = self.step = self.published = self.rolling = self.loading = (
            self.started
        ) = 0
        self.wave_queue: deque[range] = deque()
        self.trainer_free, self.issued_at, self.ready = True, {}, []
        self.again: deque[int] = deque()  # thrown away or stopped: issued before anything new
        self.arrived = [0] * (work.steps if rule.order == "strict" else 0)
        self.queued, self.queue_area, self.queue_since = 0, 0.0, 0.0
        self.training = self.publishing = self.written_at = 0.0
        self.result = Result(0.0, 0.0, 0.0, 0.0)

    def run(self) -> Result:
        """Until the last step is trained."""
        self._issue()
        self._train()
        while self.step < self.work.steps:
            if not self.events:
                raise ValueError(
                    "nothing is left to happen: a finished-first run needs more lengths than it "
                    "trains on"
                )
            self.now, _, happen, arguments = heapq.heappop(self.events)
            happen(*arguments)
        return self._summary()

    def _at(self, when: float, happen, *arguments) -> None:
        self.count += 1  # events of one moment happen in the order in which they were planned
        heapq.heappush(self.events, (when, self.count, happen, arguments))

    # Rollout servers.

    def _issue(self) -> None:
        touched = set()
        while (index := self._next()) is not None:
            open_load = np.where(self.version >= self._version_needed(index), self.load, FULL)
            chosen = int(open_load.argmin())
            if open_load[chosen] >= self.rates.max_batch:
                break
            if self.again:
                self.again.popleft()
            else:
                self.next_index += 1
            replica = self.replicas[chosen]
            if chosen not in touched:
                replica.advance(self.now)
                touched.add(chosen)
            replica.add(index, int(self.work.lengths[index]))
            self.load[chosen] += 1
            self.issued_at[index] = replica.version
        for chosen in touched:
            self._plan(chosen)

    def _next(self) -> int | None:
        if self.again:
            return self.again[0]
        limit = len(self.work.lengths)
        if self.rule.order == "strict":
            limit = self.work.steps * self.work.batch
        else:
            limit = min(
                limit,
                (self.step + 1 + self.rule.max_staleness) * self.work.batch + self.result.dropped,
            )
        return self.next_index if self.next_index < limit else None

    def _version_needed(self, index: int) -> int:
        return (
            index // self.work.batch - self.rule.max_staleness if self.rule.order == "strict" else 0
        )

    def _plan(self, chosen: int) -> None:
        replica = self.replicas[chosen]
        replica.stamp += 1  # what was planned for it before is void
        if replica.running and not replica.paused:
            self._at(replica.next_end(), self._decoded, chosen, replica.stamp)

    def _decoded(self, chosen: int, stamp: int) -> None:
        replica = self.replicas[chosen]
        if stamp != replica.stamp:
            return
        replica.advance(self.now)
        for index in replica.pop_ended():
            scored = self.teacher.end(self.now, self.work.tokens(index) * self.rates.score)
            self._at(scored, self._scored, index)
            self.load[chosen] -= 1
        if replica.draining and not replica.running:
            self._pause(chosen)
        self._plan(chosen)
        self._issue()

    # Trainer.

    def _scored(self, index: int) -> None:
        self._count(1)
        if self.rule.order == "strict":
            self.arrived[index // self.work.batch] += 1
        else:
            self.ready.append(index)
        self._train()

    def _count(self, change: int) -> None:
        self.queue_area += self.queued * (self.now - self.queue_since)
        self.queue_since, self.queued = self.now, self.queued + change

    def _take(self) -> list[int] | None:
        batch = self.work.batch
        if self.rule.order == "strict":
            whole = self.arrived[self.step] == batch
            return list(range(self.step * batch, (self.step + 1) * batch)) if whole else None
        if self.rule.drop_stale:
            fresh = [
                i for i in self.ready if self.step - self.issued_at[i] <= self.rule.max_staleness
            ]
            self._count(len(fresh) - len(self.ready))
            self.result.dropped += len(self.ready) - len(fresh)
            self.ready = fresh
        if len(self.ready) < batch:
            return None
        taken, self.ready = self.ready[:batch], self.ready[batch:]
        return taken

    def _train(self) -> None:
        if not self.trainer_free or self.step == self.work.steps or (taken := self._take()) is None:
            return
        self._count(-len(taken))
        self.result.trained.append(taken)
        self.result.staleness.update(self.step - self.issued_at[index] for index in taken)
        cost = sum(map(self.work.tokens, taken)) * self.rates.train / self.trainers
        self.trainer_free, self.training = False, self.training + cost
        self._at(self.now + cost, self._trained)

    def _trained(self) -> None:
        self.step += 1
        self.result.seconds = self.now
        self.result.ended.append(self.now)
        if self.step == self.work.steps:
            self._continue()
        else:
            self.publishing += self.rates.publish
            self._at(self.now + self.rates.publish, self._published, self.step)

    def _continue(self) -> None:
        self.trainer_free = True
        self._issue()
        self._train()

    # Pushes.

    def _published(self, version: int) -> None:
        self.published, self.written_at = version, self.now
        if not self.rolling:
            self._roll()
        if not self.rule.trainer_waits:
            self._continue()

    def _roll(self) -> None:
        # a version that came while an older one was rolled out waits, or is skipped
        self.rolling = self.published
        self.wave_queue = deque(self.waves)
        self._next_wave()

    def _next_wave(self) -> None:
        if not self.wave_queue:
            done, self.rolling = self.rolling, 0
            if done < self.published:
                self._roll()
            elif self.rule.trainer_waits:
                self.publishing += self.now - self.written_at
                self._continue()
            return
        wave = self.wave_queue.popleft()
        self.loading = len(wave)
        for chosen in wave:
            replica = self.replicas[chosen]
            self.load[chosen] += FULL  # takes nothing new
            if self.rule.at_push == "drain" and replica.running:
                replica.draining = True
            else:
                self._pause(chosen)

    def _pause(self, chosen: int) -> None:
        replica = self.replicas[chosen]
        replica.advance(self.now)
        replica.paused, replica.draining = True, False
        if self.rule.at_push == "restart":
            self.again.extend(sorted(index for _, index in replica.running))
            self.result.restarts += len(replica.running)
            self.load[chosen] -= len(replica.running)
            replica.running = []
        self._plan(chosen)
        self._at(self.now + self.rates.load, self._loaded, chosen)

    def _loaded(self, chosen: int) -> None:
        replica = self.replicas[chosen]
        replica.advance(self.now)
        replica.paused, replica.version = False, self.rolling
        self.version[chosen] = self.rolling
        self.load[chosen] -= FULL
        self._plan(chosen)
        self.loading -= 1
        if not self.loading:
            self._next_wave()
        # after all that come back at this moment: the first must not get everything
        self._at(self.now, self._issue)

    def _summary(self) -> Result:
        result, self.now = self.result, self.result.seconds
        self._count(0)
        for replica in self.replicas:
            replica.advance(self.now)
        result.trainer_publishing = self.publishing / self.now
        result.trainer_idle = 1 - (self.training + self.publishing) / self.now
        result.rollout_idle = 1 - sum(replica.busy for replica in self.replicas) / (
            self.now * len(self.replicas)
        )
        result.queue_mean = self.queue_area / self.now
        return result


def asynchronous(work: Workload, rates: Rates, split: Split, rule: Rule) -> Result:
    """One run under `rule`."""
    return Asynchronous(work, rates, split, rule).run()


# ---- Which split? --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A split with the settings that go with it, and what the simulation says of them."""

    split: Split
    max_staleness: int
    max_batch: int  # running sequences of a replica
    result: Result


def splits(gpus: int, parts: int = 16) -> list[Split]:
    """All ways to deal `gpus` out to the roles in portions of gpus / parts, at least one portion
    each.
    """
    unit = max(1, gpus // parts)
    units = gpus // unit
    return [
        Split(rollout * unit, (units - rollout - trainer) * unit, trainer * unit)
        for rollout in range(1, units - 1)
        for trainer in range(1, units - rollout)
    ]


def promising(candidates: Iterable[Split], work: Workload, rates: Rates, count: int) -> list[Split]:
    """The `count` candidates that would be fastest if every role were busy all the time: the
    slowest role decides.
    """
    tokens = float(np.mean(work.lengths)) + work.prompt

    def bound(split: Split) -> float:
        decoding = (
            (tokens - work.prompt)
            * rates.token_seconds(rates.max_batch)
            / rates.max_batch
            / split.rollout
        )
        scoring, training = rates.score / split.teacher, rates.train / split.trainer
        return max(decoding, tokens * scoring, tokens * training)

    return sorted(candidates, key=bound)[:count]


def choose(
    work: Workload,
    rates: Rates,
    candidates: Iterable[Split],
    *,
    staleness: Iterable[int],
    batches: Iterable[int],
    max_trainer_idle: float = 1.0,
    slack: float = 0.02,
) -> Choice:
    """The candidate that trains `work` fastest with the trainer idle for less than
    `max_trainer_idle`, or without that bound if none keeps it. Of those within `slack` of the
    fastest, the one with the least staleness.
    """
    tried = [
        Choice(
            split,
            bound,
            batch,
            asynchronous(work, replace(rates, max_batch=batch), split, Rule(bound)),
        )
        for split in candidates
        for bound in staleness
        for batch in batches
    ]
    kept = [choice for choice in tried if choice.result.trainer_idle < max_trainer_idle] or tried
    fastest = min(choice.result.seconds for choice in kept)
    close = [choice for choice in kept if choice.result.seconds <= (1 + slack) * fastest]
    return min(close, key=lambda choice: (choice.max_staleness, choice.result.seconds))
