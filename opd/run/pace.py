"""When a run saves by the clock, and when its time is over.

Rank 0's clock decides for all ranks: `Loop.after_step` shares what it says.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from opd.config import RunConfig

# `--save_every auto`: as often as saving takes a fiftieth of the time, within these bounds.
SHARE, SOONEST_S, LATEST_S = 0.02, 600.0, 1800.0
UNKNOWN_SAVE_S = 60.0  # what a save is held to take before the first one
RECENT = 20  # steps whose longest the next one is held to take


class Pace:
    """Measures steps and saves. `age_s` is how long this process has run."""

    def __init__(self, cfg: RunConfig, age_s: float, clock: Callable[[], float] = time.monotonic):
        self.cfg, self.clock = cfg, clock
        now = clock()
        self._began = now - age_s
        self._last_step = self._last_save = now
        self._save_s: float | None = None
        self._steps: deque[float] = deque(maxlen=RECENT)

    def stepped(self) -> None:
        """A step is over, with all that comes with it."""
        now = self.clock()
        self._steps.append(now - self._last_step)
        self._last_step = now

    def saved(self, seconds: float) -> None:
        """A checkpoint was written in so many seconds."""
        self._save_s = seconds
        self._last_save = self.clock()

    def is_due(self, step: int) -> bool:
        """Whether `--save_every` with a number saves after this step."""
        every = self.cfg.save_every
        return every not in ("auto", 0) and step % every == 0

    @property
    def is_time_to_save(self) -> bool:
        """Whether `--save_every auto` saves now."""
        if self.cfg.save_every != "auto":
            return False
        after = (self._save_s or 0.0) / SHARE
        return self.clock() - self._last_save >= min(max(after, SOONEST_S), LATEST_S)

    @property
    def is_over(self) -> bool:
        """Whether another step and its save could pass `--time_limit`."""
        if self.cfg.time_limit is None:
            return False
        save_s = UNKNOWN_SAVE_S if self._save_s is None else self._save_s
        ends = self.clock() + max(self._steps, default=0.0) + 2 * save_s
        return ends > self._began + 3600 * self.cfg.time_limit


def process_age_s() -> float:
    """How long ago this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
