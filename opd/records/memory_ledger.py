"""The memory of a run, phase by phase: `ledger.jsonl`, and at the end what was predicted against
what was measured.

All sizes are bytes of this rank. On a GPU a phase is measured by what the whole device holds,
because vLLM's sleeping engines allocate outside torch; on a CPU by the resident memory of the
process.
"""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from opd.engines.host_memory import pinned_bytes


def host_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


def _host_peak_bytes() -> int:
    """The most that was resident since the last `_forget_host_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return host_bytes()


def _forget_host_peak() -> None:
    with suppress(OSError):  # a container may forbid it; the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


class Ledger:
    """Writes a line at every entry, turn and exit of a phase, and keeps each phase's peak.

    Without a path nothing is written; peaks are kept all the same.
    """

    def __init__(self, path: Path | None, rank: int = 0):
        self.path, self.rank = path, rank
        self.step = -1
        self.base = host_bytes()  # what the process weighed before it held any model
        self.peaks: dict[str, int] = {}  # of the whole run
        self._step_peaks: dict[str, int] = {}  # since the last `take_peaks`
        self._entered = 0.0

    def begin(self) -> None:
        """A phase begins here, before anything is moved for it: its seconds and its peak count the
        moves.
        """
        self._entered = time.perf_counter()
        self._forget_peak()

    def enter(self, phase: str, awake: Iterable[str]) -> None:
        """All that the phase needs is awake."""
        self._write(phase, "enter", awake, 0.0)

    def _forget_peak(self) -> None:
        _forget_host_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def turn(self, phase: str, event: str, awake: Iterable[str], seconds: float = 0.0) -> None:
        """A teacher's turn has begun, after `seconds` of waking, or it ends and the teacher is
        about to sleep.
        """
        self._write(phase, event, awake, seconds)
        self._forget_peak()

    def leave(self, phase: str, awake: Iterable[str]) -> None:
        self._write(phase, "exit", awake, time.perf_counter() - self._entered)

    def take_peaks(self) -> dict[str, int]:
        """Peak of each phase since the last call: the metrics `mem/<phase>_gib`."""
        peaks, self._step_peaks = self._step_peaks, {}
        return peaks

    def compare(self, predicted: dict[str, int]) -> dict[str, dict[str, float]]:
        """phase -> {predicted, measured, error}; the last line of the ledger.

        On a CPU both are above the bare process.
        """
        base = 0 if torch.cuda.is_available() else self.base
        result = {}
        for phase, peak in self.peaks.items():
            if phase in predicted:
                measured = max(1, peak - base)
                error = predicted[phase] / measured - 1
                result[phase] = {
                    "predicted": predicted[phase],
                    "measured": measured,
                    "error": round(error, 4),
                }
        self._append({"rank": self.rank, "event": "predicted and measured", "phases": result})
        return result

    def _write(self, phase: str, event: str, awake: Iterable[str], seconds: float) -> None:
        cuda = torch.cuda.is_available()
        free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
        host, host_peak = host_bytes(), _host_peak_bytes()
        # Torch's peak is above what it holds now by what has been freed since the last line that
        # forgot it. vLLM's engines move beside torch, at those lines only.
        transient = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved() if cuda else 0
        held = total - free + transient if cuda else host_peak
        for peaks in (self.peaks, self._step_peaks):
            peaks[phase] = max(peaks.get(phase, 0), held)
        self._append(
            {
                "rank": self.rank,
                "step": self.step,
                "phase": phase,
                "event": event,
                "seconds": round(seconds, 4),
                "awake": list(awake),
                "gpu_allocated": torch.cuda.memory_allocated() if cuda else 0,
                "gpu_reserved": torch.cuda.memory_reserved() if cuda else 0,
                "gpu_peak": torch.cuda.max_memory_allocated() if cuda else 0,
                "gpu_held": total - free,
                "host_rss": host,
                "host_peak_rss": host_peak,
                "host_pinned": pinned_bytes(),
            }
        )

    def _append(self, line: dict) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
