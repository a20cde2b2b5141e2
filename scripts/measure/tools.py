"""What the benchmarks share: sides that take turns, a meter for peak memory, facts of the machine,
plots.

A ratio of two times means something only if both were measured under the same conditions. So the
sides of a benchmark run in one process, one call each per round (A B A B ...), and the median over
rounds is reported: a clock that drifts or a neighbour who wakes up meets all sides alike.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def take_turns(
    sides: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> tuple[dict[str, float], dict[str, object]]:
    """(median milliseconds, last result) of each side; every round calls each side once, in the
    order given.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, object] = {}
    for _ in range(repeats):
        for name, run in sides.items():
            # two results of one side at once would be memory that no user holds
            results.pop(name, None)
            gc.collect()
            _finish(device)
            start = time.perf_counter()
            results[name] = run()
            _finish(device)
            times_ms[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times_ms.items()}, results


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """How far memory rose above where it stood, at its highest, while `run` ran.

    On CUDA this is what PyTorch's allocator handed out. On the CPU it is resident memory, whose
    high-water mark Linux resets on request; freed memory that the C library keeps would hide a
    rise, so use it in a fresh process (`in_child`), after a tiny warm-up that loads the libraries.
    """
    gc.collect()
    if device == "cuda":
        _finish(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _finish(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc_pid_clear_refs(5)
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def resident_bytes() -> int:
    """Memory of this process now, mapped files that it has read included."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def in_child(function: Callable, *args):
    """`function(*args)` in a fresh process; None if the machine has not the memory for it."""
    # a fork would inherit caches, and threads that are not there
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_limit_memory) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            return None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                return None
            raise


def _limit_memory() -> None:
    """An allocation beyond nine tenths of what is free now fails, instead of waking the kernel's
    killer of processes.
    """
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (available * 9 // 10, hard))


@torch.no_grad()
def bare_projection(hidden_NH: Tensor, weight_VH: Tensor, buffer_NV: Tensor) -> None:
    """Logits, a chunk at a time, into memory that is there already; N tokens, H hidden size, V
    vocabulary.
    """
    for chunk_NH in hidden_NH.split(len(buffer_NV)):
        torch.mm(chunk_NH, weight_VH.t(), out=buffer_NV[: len(chunk_NH)])


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope of log y over log x: 1 is linear, 0 flat.

    `slope([1, 2, 4], [3, 6, 12])` = 1.
    """
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(log_x, log_y).slope


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs, to four digits; None if either side was not measured."""
    return float(f"{ours / theirs:.4g}") if ours and theirs else None


def pick_device(choice: str) -> str:
    """`auto` is the GPU if there is one."""
    if choice != "auto":
        return choice
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_facts(device: str) -> dict:
    """What a reader must know to compare a number with their own."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def make_parser(doc: str) -> argparse.ArgumentParser:
    """With the first line of a benchmark's docstring, and `--json`."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object last instead of a table"
    )
    return parser


def say(text: str) -> None:
    """A line for the person who watches; standard output belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def last_error(text: str) -> str:
    """The line of a log that says what went wrong: `SomeError: ...` or `error: ...`, else the last
    one.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(^|\W)(\w+(Error|Exception)|error): ", line)]
    return (errors or lines or ["no output"])[-1][:300]


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that has a JSON object in each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_json(result: dict) -> None:
    """The result as one line, the last one of standard output."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)


def table(rows: list[dict]) -> str:
    """Rows of equal keys as aligned text; None is a dash."""
    cells = [list(rows[0])] + [
        ["-" if value is None else f"{value}" for value in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


@contextmanager
def picture(path: Path, columns: int, size: tuple[float, float], **options) -> Iterator[tuple]:
    """(figure, its axes side by side) of matplotlib, written to `path` as a PNG when the block is
    done; `size` in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    yield figure, axes[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
