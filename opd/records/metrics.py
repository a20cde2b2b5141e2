"""Metrics: accumulators on every rank, one line per step in `metrics.jsonl`, TensorBoard and the
console.

A metric is a sum and a count, added up over micro-batches and ranks and divided once, so no mean
depends on how the work was split; or it is a function of several sums, for the same reason. `flush`
is a collective and so is `histogram`; everything else is local, and only rank 0 writes.
`docs/metrics.md` has every key with its formula. All values are scalars here: no shape legend is
needed.
"""

import atexit
import collections
import datetime
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.config import GIB
from opd.distributed import gather_objects, rank
from opd.faults import fault_point
from opd.log import logger, redact_config
from opd.records.files import append_text, json_line, parse_row, replace_text
from opd.records.memory_ledger import host_bytes
from opd.records.wandb_run import WandbRun

GROUPS = (
    "loss",
    "distill",
    "teacher",
    "rollout",
    "logprob",
    "mismatch",
    "staleness",
    "optim",
    "time",
    "perf",
    "mem",
    "eval",
)
ETA_WINDOW = 20  # steps

Number = Tensor | float
# the sums of a step, as arguments -> a number, or None where there is none
Derive = Callable[..., float | None]


# ---- Metrics -------------------------------------------------------------------------------------


class Metrics:
    """Accumulates `key -> (sum, count)` on every rank and writes one line per step on rank 0.

    Keys are `group/name[/domain]`, of a served teacher `teacher/name/TEACHER`. A step is the number
    of optimizer steps done when its line is written: 0 is before training, and a checkpoint of step
    s belongs to lines 0..s. `trackers` are those of `--report_to`; `config` is shown by wandb, its
    secrets hidden.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        domains: Iterable[str],
        trackers: Collection[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self._domains = frozenset(domains)
        self._means: list[tuple[str, Number, Number]] = []
        self._maxima: list[tuple[str, Number]] = []
        self._derived: list[tuple[str, Derive, tuple[Number, ...]]] = []
        self._last_step = -1
        self._draws = "tensorboard" in trackers
        self._writer = None
        shown = redact_config(dict(config or {}))
        self._wandb = WandbRun(self.run_dir, shown) if "wandb" in trackers else None
        self._progress = _Progress(num_steps)

    def add(self, key: str, total: Number, count: Number = 1) -> None:
        """Adds a sum over `count` items; the reported mean is over all items of all ranks."""
        self._check(key)
        self._means.append((key, total, count))

    def merge(self, sums: dict[str, tuple[Number, Number]]) -> None:
        """Adds `key -> (sum [], count [])`, e.g. `LossOutput.metrics`.

        Tensors stay on their device until `flush`.
        """
        for key, (total, count) in sums.items():
            self.add(key, total, count)

    def add_max(self, key: str, value: Number) -> None:
        """Keeps the largest value of the step over all ranks."""
        self._check(key)
        self._maxima.append((key, value))

    def add_derived(self, key: str, derive: Derive, sums: tuple[Number, ...]) -> None:
        """Adds to the sums over all items of all ranks from which `derive`, a function of a module,
        makes the number.
        """
        self._check(key)
        self._derived.append((key, derive, sums))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to `time/<name>`, reported as the slowest rank's sum over the
        step.

        Waits for the GPU on both ends: kernels that are queued in one phase must not be paid for by
        the next.
        """
        self._check(f"time/{name}")
        _wait_for_gpu()
        start = time.perf_counter()
        yield
        _wait_for_gpu()
        self._means.append((f"time/{name}", time.perf_counter() - start, 1))

    def flush(self, step: int) -> dict[str, float]:
        """Reduces over the ranks and writes the line of `step`.

        Collective; returns the same row on every rank.

        A key whose count is 0 on all ranks has no mean and is left out. A value that is not finite
        is null in the file.
        """
        assert step > self._last_step, (
            f"step {step} was written already; the last one is {self._last_step}"
        )
        row = _reduce(gather_objects(self._drain()))
        if rank() == 0:
            append_text(self.run_dir / "metrics.jsonl", json_line({"step": step, **row}))
            if self._draws:
                for key, value in row.items():
                    self._tensorboard().add_scalar(key, value, step)
                self._tensorboard().flush()
            if self._wandb is not None:
                self._wandb.log(row, step)
            logger.info("step %d: %s", step, row)
            self._progress.show(step, row)
        # last: TensorBoard's writer, opened above, purges what lies beyond the step before
        self._last_step = step
        fault_point("metrics.flushed")
        return row

    def truncate(self, step: int) -> None:
        """Forgets what a run that is resumed at `step` wrote later; -1 forgets all.

        Call before the first `flush`.
        """
        assert self._writer is None, (
            "truncate after the first write: TensorBoard's events are open already"
        )
        self._last_step = step
        path = self.run_dir / "metrics.jsonl"
        if rank() == 0 and path.exists():
            rows = filter(None, map(parse_row, path.read_text(encoding="utf-8").split("\n")))
            replace_text(path, "".join(json_line(row) for row in rows if row["step"] <= step))

    def histogram(self, key: str, values: Tensor | Sequence[float], step: int) -> None:
        """Shows the distribution of all ranks' finite values in TensorBoard. Collective."""
        self._check(key)
        if isinstance(values, Tensor):
            values = values.detach().float().cpu().numpy()
        merged = np.concatenate(gather_objects(np.asarray(values, dtype=np.float32).ravel()))
        merged = merged[np.isfinite(merged)]
        if rank() == 0 and merged.size and self._draws:
            self._tensorboard().add_histogram(key, merged, step)

    def text(self, key: str, text: str, step: int) -> None:
        """Shows rank 0's text, e.g. a sample rollout, in TensorBoard: four spaces keep Markdown
        away from it.
        """
        if rank() == 0 and self._draws:
            self._tensorboard().add_text(key, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Ends the progress bar, and writes out what TensorBoard and wandb still hold."""
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.close()

    def _check(self, key: str) -> None:
        group, *rest = key.split("/", 2)
        assert group in GROUPS and rest and all(rest), (
            f"metric {key}: expected group/name[/domain] of {GROUPS}"
        )
        # Evaluation data may hold domains that no training prompt has; teachers and lags have names
        # of their own.
        known = (
            len(rest) == 1 or group in ("eval", "teacher", "staleness") or rest[1] in self._domains
        )
        assert known, f"metric {key}: not a domain of this run"

    def _drain(self) -> "_Drained":
        """This rank's sums and maxima, moved to the host with one copy per dtype."""
        means, maxima, self._means, self._maxima = self._means, self._maxima, [], []
        totals, counts, values = (
            _to_host(column)
            for column in ([m[1] for m in means], [m[2] for m in means], [m[1] for m in maxima])
        )
        sums: dict[str, tuple[float, float]] = {}
        for (key, *_), total, count in zip(means, totals, counts, strict=True):
            old_total, old_count = sums.get(key, (0.0, 0.0))
            sums[key] = (old_total + total, old_count + count)
        largest: dict[str, float] = {}
        for (key, _), value in zip(maxima, values, strict=True):
            largest[key] = _maximum([value, largest.get(key, value)])
        largest |= {key: sums.pop(key)[0] for key in list(sums) if key.startswith("time/")}
        return sums, largest, self._drain_derived()

    def _drain_derived(self) -> dict[str, tuple[Derive, list[float]]]:
        entries, self._derived = self._derived, []
        numbers = iter(_to_host([number for *_, sums in entries for number in sums]))
        derived: dict[str, tuple[Derive, list[float]]] = {}
        for key, derive, sums in entries:
            _, so_far = derived.get(key, (derive, [0.0] * len(sums)))
            derived[key] = derive, [total + next(numbers) for total in so_far]
        return derived

    def _tensorboard(self):
        if self._writer is None:
            # slow to import, and only rank 0 needs it
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir / "tb"), purge_step=self._last_step + 1)
        return self._writer


# A rank's key -> (sum, count), key -> maximum, and key -> (function, its sums).
_Drained = tuple[
    dict[str, tuple[float, float]], dict[str, float], dict[str, tuple[Derive, list[float]]]
]


def _reduce(per_rank: list[_Drained]) -> dict[str, float]:
    """Means, maxima and what is derived, over ranks that may hold different keys, in the order of
    `GROUPS`.
    """
    sums: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    maxima: dict[str, list[float]] = collections.defaultdict(list)
    arguments: dict[str, list[list[float]]] = collections.defaultdict(list)
    derive_of: dict[str, Derive] = {}
    for means, largest, derived in per_rank:
        for key, pair in means.items():
            sums[key].append(pair)
        for key, value in largest.items():
            maxima[key].append(value)
        for key, (derive, totals) in derived.items():
            arguments[key].append(totals)
            derive_of[key] = derive
    assert not sums.keys() & maxima.keys(), (
        f"both a mean and a maximum: {sorted(sums.keys() & maxima.keys())}"
    )
    row = {key: _maximum(values) for key, values in maxima.items()}
    for key, pairs in sums.items():
        count = sum(count for _, count in pairs)
        if count:
            row[key] = sum(total for total, _ in pairs) / count
    for key, derive in derive_of.items():
        value = derive(*map(sum, zip(*arguments[key], strict=True)))
        if value is not None:
            row[key] = value
    return dict(
        sorted(row.items(), key=lambda item: (GROUPS.index(item[0].split("/")[0]), item[0]))
    )


def _maximum(values: list[float]) -> float:
    """The maximum, or NaN if there is one: Python's max() would keep or lose it by position."""
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _to_host(values: Sequence[Number]) -> list[float]:
    """Python floats, with one device-to-host copy for all tensors of a device and dtype."""
    numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups[value.device, value.dtype].append(index)
    for indices in groups.values():
        stacked = torch.stack([values[i].detach().reshape(()) for i in indices])
        for index, number in zip(indices, stacked.tolist(), strict=True):
            numbers[index] = float(number)
    return numbers


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    """This rank's memory now, in GiB, for `add_max`. GPU figures are those of torch's allocator."""
    gib = {"mem/host_rss_gib": host_bytes() / GIB}
    if torch.cuda.is_available():
        gib["mem/gpu_allocated_gib"] = torch.cuda.memory_allocated() / GIB
        gib["mem/gpu_reserved_gib"] = torch.cuda.memory_reserved() / GIB
    return gib


# ---- Console -------------------------------------------------------------------------------------


class _Progress:
    """One line per step on rank 0; below it a bar where stdout is a terminal."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=ETA_WINDOW)
        self._bar = None

    def show(self, step: int, row: dict[str, float]) -> None:
        if "time/step" in row:
            self._step_seconds.append(row["time/step"])
        eta_s = None
        if self._step_seconds:
            eta_s = (self._num_steps - step) * sum(self._step_seconds) / len(self._step_seconds)
        if self._bar is None and sys.stdout.isatty():
            self._open()
        # above the bar: rich catches stdout
        print(step_line(step, self._num_steps, row, eta_s), flush=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, refresh=True)

    def _open(self) -> None:
        import rich.progress

        # Tracebacks go to stderr and must not pass through a display that may be the thing that
        # broke.
        columns = (rich.progress.BarColumn(bar_width=None), rich.progress.MofNCompleteColumn())
        self._bar = rich.progress.Progress(*columns, auto_refresh=False, redirect_stderr=False)
        self._bar.add_task("steps", total=self._num_steps)
        self._bar.start()
        atexit.register(self.close)  # gives the cursor back

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(step: int, num_steps: int, row: dict[str, float], eta_s: float | None) -> str:
    """The console's line: step, loss, speed, time left, and where the time went, in seconds."""
    parts = [f"step {step}/{num_steps}"]
    if "loss/total" in row:
        parts.append(f"loss {row['loss/total']:.4g}")
    if "perf/tokens_per_second" in row:
        parts.append(f"{row['perf/tokens_per_second']:,.0f} tok/s")
    if eta_s is not None and math.isfinite(eta_s):
        parts.append(f"eta {datetime.timedelta(seconds=round(eta_s))}")
    seconds = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/")}
    split = [
        f"{name} {seconds[name]:.2f}"
        for name in ("rollout", "score", "train", "sync")
        if name in seconds
    ]
    if "step" in seconds:
        parts.append(f"{seconds['step']:.2f}s" + (f" ({', '.join(split)})" if split else ""))
    accuracy = [
        f"{k.split('/', 2)[2]} {v:.3f}" for k, v in row.items() if k.startswith("eval/accuracy/")
    ]
    return "  ".join(parts + (["accuracy " + ", ".join(accuracy)] if accuracy else []))
