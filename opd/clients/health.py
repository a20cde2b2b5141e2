"""What a pool knows of one replica: whether it is in rotation, how many strikes it has, how fast it
is. No I/O, no clock.

A replica leaves the rotation when it is dead (its port refuses), when a probe shows another model,
after three strikes in a row, or when it is far slower than its neighbours for three windows. A
strike is a failed request, or a probe that failed while nothing else came back; requests and probes
are counted apart, since one may work where the other does not. It comes back after a probe that was
answered, and not before its time out is over; each time it leaves, that time doubles.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how often; seconds.

    A stopped or wedged replica is out after `probe_every_s`, and `strikes` times a probe's
    `probe_timeout_s` and the second that its metrics are given.
    """

    wait_s: float = (
        30.0  # a request that has failed waits this long for an answer, from its first failure
    )
    timeout_s: float = 120.0  # of one attempt, at most: see `Patience`
    patience_s: float = 15.0  # of one attempt, at least, once answers have come
    patience_factor: float = 10.0  # times the slowest answer of late
    connect_s: float = 3.0
    max_inflight: int = 32  # requests per replica
    probe_every_s: float = 2.0
    probe_timeout_s: float = 3.0
    strikes: int = 3
    retry_share: float = 0.1  # of the requests may be sent again to replicas that are alive
    retry_reserve: float = 10.0  # and so many at least
    slow_factor: float = 5.0  # times the fastest neighbour
    slow_s: float = 1.0  # nobody is slow below
    slow_window_s: float = 1.0  # this often it is looked at
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
    by_replica: Counter = field(default_factory=Counter)  # url -> answers
    bytes_sent: int = 0  # bodies, probes included
    bytes_received: int = 0


@dataclass(slots=True)
class Health:
    """One URL. Times are those of a monotonic clock."""

    url: str
    limits: Limits
    in_rotation: bool = True
    suspect: bool = False  # a connection broke: no new requests until a probe says whether it lives
    strikes: int = 0  # requests that failed since one was answered
    probe_strikes: int = 0
    slow_windows: int = 0
    answers: int = 0  # forward progress, of requests and probes
    sent: int = 0
    last_error: str = ""
    not_before: float = 0.0  # it said that it is busy until then
    back_after: float = 0.0  # no earlier return to the rotation
    engine_steps: float = -1.0  # what its metrics said last; below 0 nothing
    # attempt -> when it was sent, its size
    inflight: dict[object, tuple[float, int]] = field(default_factory=dict)
    _pace: float = 0.0  # s per request, a moving average; 0 before the first
    _size: float = 0.0  # of those requests, in whatever unit the pool has
    _out_s: float = 0.0  # how long it was out last time
    _returned: float = 0.0

    def may_take(self, now: float) -> bool:
        """Whether a new request may go there."""
        return (
            self.in_rotation
            and not self.suspect
            and now >= self.not_before
            and len(self.inflight) < self.limits.max_inflight
        )

    def answered(self, seconds: float, size: int = 0) -> None:
        """An answer to a request came, and is good."""
        self.answers += 1
        self.strikes = 0
        share = 0.3 if self._pace else 1.0
        self._pace += share * (seconds - self._pace)
        self._size += share * (size - self._size)

    def probed(self) -> None:
        """An answer to a probe came, and is good.

        It says nothing of how fast requests are, or whether they are answered.
        """
        self.answers += 1
        self.probe_strikes, self.engine_steps = (
            0,
            -1.0,
        )  # a count of long ago would pass for progress

    def struck(self, error: str) -> bool:
        """A request failed; whether it was the last one allowed."""
        self.strikes, self.last_error = self.strikes + 1, error
        return self.strikes >= self.limits.strikes

    def probe_struck(self, error: str) -> bool:
        """A probe failed; whether it was the last one allowed."""
        self.probe_strikes, self.last_error = self.probe_strikes + 1, error
        return self.probe_strikes >= self.limits.strikes

    def leave(self, error: str, now: float) -> None:
        """Out of rotation. Who leaves again soon after coming back stays out for twice as long."""
        soon = now - self._returned < 4 * max(self._out_s, self.limits.probe_every_s)
        wanted = 2 * self._out_s if soon and self._out_s else self.limits.shortest_out_s
        self._out_s = min(wanted, self.limits.longest_out_s)
        self.in_rotation, self.suspect, self.last_error = False, False, error
        self.back_after, self.slow_windows = now + self._out_s, 0

    def come_back(self, now: float) -> bool:
        """A probe was answered: in rotation again, if its time is over. Whether it is."""
        if now >= self.back_after:
            self.in_rotation, self._returned = True, now
            self.strikes = self.probe_strikes = 0
            self._pace = self._size = 0.0
        return self.in_rotation

    def latency(self, now: float) -> tuple[float, float]:
        """(seconds, size) of a request here at the moment: of the last answers, or of the oldest
        that waits for one.
        """
        sent, size = min(self.inflight.values(), default=(now, 0))
        return max((self._pace, self._size), (now - sent, size))

    def is_slow(self, others: list["Health"], now: float) -> bool:
        """One window more: whether three in a row were far slower than those of the fastest
        neighbour.

        Like is compared with like: what takes long everywhere makes nobody slow, and a request many
        times the size of those that a neighbour answered may take as many times as long. A
        neighbour that has answered none says nothing.
        """
        seconds, size = self.latency(now)
        neighbours = [
            other.latency(now)
            for other in others
            if other is not self and other.in_rotation and other._pace
        ]
        fastest = min(
            (s * max(1.0, size / max(1.0, their_size)) for s, their_size in neighbours),
            default=float("inf"),
        )
        bound = max(self.limits.slow_s, self.limits.slow_factor * fastest)
        self.slow_windows = self.slow_windows + 1 if self.inflight and seconds > bound else 0
        return self.slow_windows >= 3


def slow_ones(replicas: list[Health], now: float) -> list[Health]:
    """Those in rotation that are far slower than the others; to be asked once a window."""
    rest = [replica for replica in replicas if replica.in_rotation]
    return [replica for replica in rest if replica.is_slow(rest, now)]


@dataclass(slots=True)
class RetryBudget:
    """How often requests may be sent again to replicas that are alive: a share of all requests, and
    then one at a time.

    A request that cannot be dropped must be sent until it is answered; but a fleet that fails now
    and then must not get a multiple of the load for it. Requests that a dead replica took with it
    are no retries: nobody answers them twice.
    """

    limits: Limits
    tokens: float = 0.0
    one_under_way: bool = False

    def __post_init__(self):
        self.tokens = self.limits.retry_reserve

    def earn(self) -> None:
        """A new request came."""
        self.tokens = min(self.tokens + self.limits.retry_share, 10 * self.limits.retry_reserve)

    def spend(self) -> bool | None:
        """Whether a retry may go now: False: paid for; True: as the one beyond the budget; None: it
        has to wait.
        """
        if self.tokens >= 1:
            self.tokens -= 1
            return False
        if self.one_under_way:
            return None
        self.one_under_way = True
        return True


@dataclass(slots=True)
class Patience:
    """How long an attempt may take, for replicas that lose a request while they answer others, and
    probes.

    `timeout_s` has to be long enough for the worst; once answers come, ten times the slowest of
    them is long enough. An attempt that was given up too early has twice the time when it is made
    again.
    """

    limits: Limits
    slowest: float = 0.0  # s, of the answers of late; 0 before the first

    def answered(self, seconds: float) -> None:
        """An attempt was answered; what was slow long ago, as a first request that compiles, is
        forgotten.
        """
        self.slowest = max(seconds, 0.95 * self.slowest)

    def of(self, timeouts: int) -> float:
        """Seconds for the next attempt of a request that has run out of time so many times."""
        if not self.slowest:
            return self.limits.timeout_s
        wanted = max(self.limits.patience_s, self.limits.patience_factor * self.slowest)
        return min(self.limits.timeout_s, wanted * 2**timeouts)
