"""What a simulated run is made of: rates, GPUs, response lengths, rules, results; and the
synchronous runs.

A replica decodes its n running sequences together, one token each in a + b n seconds: a reads the
weights, b is what a sequence adds (its KV cache, its arithmetic). Each token of a running sequence
costs the same, wherever it stands, so a replica is a clock that counts tokens per sequence, and a
sequence ends when the clock reaches its mark.

Pure: everything follows from the arguments. All times are seconds, all lengths tokens.
"""

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Rates:
    """What the hardware does.

    Rates per token are GPU-seconds: n GPUs of a role take an n-th of them.
    """

    decode_a: float  # s for a token of one replica, whatever its batch
    decode_b: float  # s more for each running sequence
    max_batch: int  # running sequences of a replica
    score: float  # GPU-s for each token of a sequence that a teacher reads
    train: float  # GPU-s for each token: forward, backward, step
    # s in which the trainer gathers and writes the weights, and does nothing else
    publish: float = 0.0
    load: float = 0.0  # s in which a replica is paused to take them

    def token_seconds(self, batch: int) -> float:
        """Seconds in which each of `batch` running sequences gets one token."""
        return self.decode_a + self.decode_b * batch


@dataclass(frozen=True)
class Split:
    """GPUs of each role. A rollout replica is one GPU."""

    rollout: int
    teacher: int
    trainer: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.rollout + self.teacher + self.trainer


@dataclass(frozen=True)
class Workload:
    """Response lengths in the order of the sample index; `steps` steps of `batch` samples are
    trained.
    """

    lengths: np.ndarray
    batch: int
    steps: int
    prompt: int = 0  # tokens of a prompt: read by teacher and trainer

    def tokens(self, index: int) -> int:
        """Tokens of sample `index`, prompt and response."""
        return int(self.lengths[index]) + self.prompt


@dataclass(frozen=True)
class Rule:
    """Who may be issued, what is trained next, and what a push does to running responses."""

    max_staleness: int
    # partial rollout; drain: they finish first; restart: they begin again under the new weights
    at_push: Literal["keep", "drain", "restart"] = "keep"
    # finished: the first B that are ready. Issues up to (max_staleness + 1) B ahead of training
    order: Literal["strict", "finished"] = "strict"
    # with finished: what is older than max_staleness when it is taken is thrown away
    drop_stale: bool = False
    # replicas take new weights in this many groups, one after the other, so that the rest keeps
    # serving
    waves: int = 2
    # until the last replica has loaded, and not only until the weights are written
    trainer_waits: bool = True


@dataclass
class Result:
    """Of one run."""

    seconds: float
    trainer_idle: float  # fraction of the time in which the trainer waits for samples
    trainer_publishing: float  # fraction in which it hands out weights
    rollout_idle: float  # fraction of all replicas' time without a running sequence, or paused
    trained: list[list[int]] = field(default_factory=list)  # sample indices, step by step
    ended: list[float] = field(default_factory=list)  # when each step was trained
    # step - version at the first token -> samples
    staleness: Counter = field(default_factory=Counter)
    dropped: int = 0
    restarts: int = 0
    queue_mean: float = 0.0  # samples that are ready and wait for the trainer, over time


def lognormal_lengths(count: int, mean: float, sigma: float, maximum: int, seed: int) -> np.ndarray:
    """`count` response lengths: lognormal with this mean before it is cut at `maximum`; the 99th
    percentile over the median is e^(2.33 sigma). sigma 0 is `mean` everywhere.
    """
    normal = np.random.default_rng(seed).standard_normal(count)
    lengths = np.exp(np.log(mean) - sigma**2 / 2 + sigma * normal)
    return np.clip(np.rint(lengths), 1, maximum).astype(np.int64)


# ---- Synchronous ---------------------------------------------------------------------------------


def decode_times(lengths: np.ndarray, rates: Rates) -> np.ndarray:
    """When each response of one replica's share ends; those beyond `max_batch` wait for a place, in
    order.
    """
    ends, running = np.zeros(len(lengths)), []
    waiting, clock, now = deque(range(len(lengths))), 0, 0.0
    while waiting or running:
        while waiting and len(running) < rates.max_batch:
            index = waiting.popleft()
            heapq.heappush(running, (clock + int(lengths[index]), index))
        now += (running[0][0] - clock) * rates.token_seconds(len(running))
        clock = running[0][0]
        while running and running[0][0] == clock:
            ends[heapq.heappop(running)[1]] = now
    return ends


class Pool:
    """GPUs that read one sequence at a time, first come, first served."""

    def __init__(self, gpus: int):
        self.free = [0.0] * gpus

    def end(self, arrival: float, cost: float) -> float:
        """When a job is done that comes at `arrival` and takes `cost` seconds; arrivals must not go
        back in time.
        """
        if not self.free:  # nobody has this role
            return arrival
        end = max(arrival, self.free[0]) + cost
        heapq.heapreplace(self.free, end)
        return end


def synchronous(work: Workload, rates: Rates, split: Split | int) -> Result:
    """Every step waits for the one before.

    With an int, that many GPUs do everything, one thing after the other; with a Split, the servers
    read what has ended while the rest is being written, but no GPU helps with another's role.
    """
    trained = [
        list(range(step * work.batch, (step + 1) * work.batch)) for step in range(work.steps)
    ]
    colocated = isinstance(split, int)
    replicas, trainers = (split, split) if colocated else (split.rollout, split.trainer)
    push, waited, training, decoding, ended = rates.publish + rates.load, 0.0, 0.0, 0.0, []
    for indices in trained:
        lengths = work.lengths[indices[0] : indices[-1] + 1]
        tokens = lengths + work.prompt
        shares = [decode_times(lengths[replica::replicas], rates) for replica in range(replicas)]
        ends = np.empty(len(lengths))
        for replica, share in enumerate(shares):
            ends[replica::replicas] = share
        if colocated:  # the training pass has the log-probabilities, so nobody computes them before
            waited += ends.max() + tokens.sum() * rates.score / split
        else:
            waited += _last_scored(ends, tokens, rates, split)
        training += tokens.sum() * rates.train / trainers
        decoding += sum(share.max() for share in shares if len(share)) / replicas
        ended.append(float(waited + training) + push * len(ended))
    pushing = push * (work.steps - 1)
    seconds = float(waited + training + pushing)
    samples = Counter({0: work.steps * work.batch})
    return Result(
        seconds,
        float(waited) / seconds,
        pushing / seconds,
        1 - float(decoding) / seconds,
        trained,
        ended,
        samples,
    )


def _last_scored(ends: np.ndarray, tokens: np.ndarray, rates: Rates, split: Split) -> float:
    teacher = Pool(split.teacher)
    order = np.argsort(ends, kind="stable")
    return max(teacher.end(ends[i], tokens[i] * rates.score) for i in order)
