"""Servers that are to run: who died is said, and started again on the same port if that is wanted.

A server that dies before it is ready, or within EARLY_SECONDS after, dies early. It is given up after EARLY_DEATHS of those in
a row, with a longer wait before each start: what cannot run must not load its weights for ever.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from opd.replicas import POLL_SECONDS, Replica

EARLY_SECONDS = 60.0
EARLY_DEATHS = 3
FIRST_WAIT = 1.0  # s before a start; twice that after each early death more
ASK_SECONDS = 5.0  # for the first answer of a server that came back: the others are not watched meanwhile


@dataclass(slots=True)
class Restarts:
    """When one server is started again, and when no more. No I/O, no clock: times are those of a monotonic one, in seconds."""

    ready_at: float | None = None
    early_deaths: int = 0  # in a row

    def died(self, now: float) -> float | None:
        """How long to wait before the next start; None: it is given up."""
        late = self.ready_at is not None and now - self.ready_at >= EARLY_SECONDS
        self.early_deaths = 0 if late else self.early_deaths + 1
        self.ready_at = None
        if self.early_deaths >= EARLY_DEATHS:
            return None
        return FIRST_WAIT * 2 ** max(0, self.early_deaths - 1)


class _Watched:
    """A replica, and what became of it."""

    def __init__(self, replica: Replica, start_seconds: float, say: Callable[[str], None]):
        self.replica, self.start_seconds, self.say = replica, start_seconds, say
        self.restarts = Restarts(ready_at=time.monotonic())
        self.next_start: float | None = None  # it is dead until then
        self.deadline = 0.0  # to be ready again

    @property
    def up(self) -> bool:
        """Whether it was ready when it was looked at last."""
        return self.restarts.ready_at is not None

    def look(self) -> bool:
        """Does what is to be done now. Whether it died since the last look."""
        now = time.monotonic()
        if self.next_start is not None:
            return now >= self.next_start and not self._started(now)
        if not self.replica.alive:
            return True
        if not self.up:
            if self.replica.is_ready(ASK_SECONDS):
                self.restarts.ready_at = time.monotonic()
                self.say(f"{self.replica.url} is back: process {self.replica.process.pid}")
            elif now >= self.deadline:
                self.say(f"{self.replica.url} is not ready within {self.start_seconds:g} s, and is killed")
                with suppress(subprocess.TimeoutExpired):  # a driver holds it: it is tried again
                    self.replica.kill()  # the next look finds it dead
        return False

    def _started(self, now: float) -> bool:
        self.next_start, self.deadline = None, now + self.start_seconds
        try:
            self.replica.restart()
        except OSError as error:  # no memory for a process, no log directory: it must not take the others along
            self.say(f"{self.replica.url} cannot be started: {error}")
            return False
        return True


def watch(replicas: Sequence[Replica], *, restart: bool, start_seconds: float, say: Callable[[str], None]) -> int:
    """Says who dies, until all have and none is started again: then it returns 1."""
    watched = [_Watched(replica, start_seconds, say) for replica in replicas]
    while watched:
        time.sleep(POLL_SECONDS)
        for one in [one for one in watched if one.look()]:
            wait = one.restarts.died(time.monotonic())
            if not restart or wait is None:
                watched.remove(one)
                then = f"; given up: its last {EARLY_DEATHS} deaths came early" if restart else ""
            else:
                one.next_start = time.monotonic() + wait
                then = f"; it is started again in {wait:g} s"
            replica, left = one.replica, sum(other.up for other in watched)
            say(
                f"{replica.url} died with status {replica.process.returncode}, {left} left{then}: see {replica.log}\n"
                f"{replica.last_lines()}"
            )
    return 1
