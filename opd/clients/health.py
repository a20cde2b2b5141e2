"""What a pool knows of one replica: whether it is in rotation, how many strikes it has, and when it
takes the next request. No I/O, no clock.

A replica leaves the rotation when it is dead (its port refuses), when a probe shows another model,
or after three strikes in a row. A strike is a failed request, or a probe that failed while nothing
else came back; requests and probes are counted apart, since one may work where the other does not.
It comes back after a probe that was answered, and not before its time out is over; each time it
leaves, that time doubles.

A replica that has failed a request, or has just come back, takes its requests one by one: the gap
between two of them doubles until one is answered, which ends it. So a failure that lasts costs few
requests beyond those that were under way when it began, however many wait.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

SHORTEST_GAP_S, LONGEST_GAP_S = 0.1, 2.0  # between two requests to a replica that has failed


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how often; seconds.

    A stopped or wedged replica is out after `probe_every_s`, and `strikes` times a probe's
    `probe_timeout_s` and the second that its metrics are given.
    """

    # A request that has failed waits this long, from its first failure or the last answer that any
    # request got.
    wait_s: float = 30.0
    timeout_s: float = 120.0  # of one attempt
    connect_s: float = 3.0
    max_inflight: int = 32  # requests per replica
    probe_every_s: float = 2.0
    probe_timeout_s: float = 3.0
    strikes: int = 3
    shortest_out_s: float = 0.5
    longest_out_s: float = 30.0


@dataclass(slots=True)
class Stats:
    """What a pool did since it was asked last."""

    requests: int = 0  # answered
    retries: int = 0  # sent again although their replica was alive
    failovers: int = 0  # sent again because their replica had left the rotation
    ejections: int = 0
    failures: Counter = field(default_factory=Counter)  # kind -> how many
    tokens: int = 0
    most_inflight: int = 0
    latencies: list[float] = field(default_factory=list)  # s, from submission to answer
    bytes_received: int = 0  # bodies, probes included


class ReplicaState(Enum):
    """Whether a replica is given requests."""

    SERVING = auto()
    SUSPECT = auto()  # a connection broke: none until a probe says whether it lives
    OUT = auto()  # of rotation: none, and what was under way there has gone elsewhere


@dataclass(slots=True)
class Health:
    """One URL. Times are those of a monotonic clock."""

    url: str
    limits: Limits
    state: ReplicaState = ReplicaState.SERVING
    strikes: int = 0  # requests that failed since one was answered
    probe_strikes: int = 0
    answers: int = 0  # forward progress, of requests and probes
    sent: int = 0
    last_error: str = ""
    not_before: float = 0.0  # it said that it is busy until then
    back_after: float = 0.0  # no earlier return to the rotation
    engine_steps: float = -1.0  # what its metrics said last; below 0 nothing
    inflight: dict[object, float] = field(default_factory=dict)  # request -> when it was sent
    _gap_s: float = 0.0  # between two requests; 0 where the last one was answered
    _gap_until: float = 0.0
    _out_s: float = 0.0  # how long it was out last time
    _returned: float = 0.0

    @property
    def in_rotation(self) -> bool:
        return self.state is not ReplicaState.OUT

    def may_take(self, now: float) -> bool:
        """Whether a new request may go there."""
        return (
            self.state is ReplicaState.SERVING
            and now >= max(self.not_before, self._gap_until)
            and len(self.inflight) < self.limits.max_inflight
        )

    def take(self, request: object, now: float) -> None:
        """A request is sent there."""
        self.sent += 1
        self.inflight[request] = now
        self._gap_until = now + self._gap_s
        self._gap_s = min(2 * self._gap_s, LONGEST_GAP_S)

    def answered(self) -> None:
        """An answer to a request came, and is good."""
        self.answers += 1
        self.strikes, self._gap_s, self._gap_until = 0, 0.0, 0.0

    def probed(self) -> None:
        """An answer to a probe came, and is good.

        It says nothing of whether requests are answered.
        """
        self.answers += 1
        # a count of long ago would pass for progress
        self.probe_strikes, self.engine_steps = 0, -1.0

    def failed(self, error: str, now: float) -> None:
        """A request failed: the next ones go one by one."""
        self.last_error = error
        if not self._gap_s:
            self._gap_s, self._gap_until = SHORTEST_GAP_S, now + SHORTEST_GAP_S

    def struck(self, error: str) -> bool:
        """A failed request counts against it; whether it was the last one allowed."""
        self.strikes, self.last_error = self.strikes + 1, error
        return self.strikes >= self.limits.strikes

    def probe_struck(self, error: str) -> bool:
        """A probe failed; whether it was the last one allowed."""
        self.probe_strikes, self.last_error = self.probe_strikes + 1, error
        return self.probe_strikes >= self.limits.strikes

    def leave(self, error: str, now: float) -> list[object]:
        """Out of rotation: what was under way there, which it is no longer.

        Who leaves again soon after coming back stays out for twice as long.
        """
        soon = now - self._returned < 4 * max(self._out_s, self.limits.probe_every_s)
        wanted = 2 * self._out_s if soon and self._out_s else self.limits.shortest_out_s
        self._out_s = min(wanted, self.limits.longest_out_s)
        self.state, self.last_error, self.back_after = ReplicaState.OUT, error, now + self._out_s
        moved = list(self.inflight)
        self.inflight.clear()
        return moved

    def come_back(self, now: float) -> bool:
        """A probe was answered: in rotation again, if its time is over. Whether it is."""
        if now >= self.back_after:
            self.state, self._returned = ReplicaState.SERVING, now
            self.strikes = self.probe_strikes = 0
            self._gap_s, self._gap_until = SHORTEST_GAP_S, now
        return self.in_rotation
