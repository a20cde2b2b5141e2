"""Peak memory of a run with 1, 2, 4 and 8 teachers of different sizes: it should be that of the
largest teacher alone.

Real runs of train_mopd.py on the CPU, with random models (Qwen3, float32): a tiny student, and
teachers that run on transformers (`--teacher_backend hf`). The largest teacher is in every run, so
N = 1 is the largest alone. Two residencies:

* ``disk``: a sleeping teacher keeps nothing, so the peak should not grow with N: ``peak_1`` to
  ``peak_8``, and
  ``flatness`` = peak_4 / peak_1;
* ``host``, for contrast: on a CPU the device is the host, nothing is given back, and the peak grows
  by every teacher:
  ``host_4``.

Most of a peak is libraries and the sampler, which would make any growth look small. So ``growth_4``
and ``host_growth_4`` are the rise from one teacher to four over the weights of the three that came:
0 is flat, 1 is all of them at once.

The peak is the highest sum of resident memory over the run's processes, read every 20 ms. Pages
that two of them share count twice; those of the files that a teacher on the disk is mapped from
count like any other.

`planner_error` is (predicted - measured) / measured for four teachers on the disk: the prediction
of `opd.plan` starts where `prepare` ends, before any engine and its libraries; a process that
stands there is measured too (``before_engines``).

    python scripts/bench_colocation.py --json   # five minutes on two cores
"""

import json
import os
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import train_mopd
from opd.inputs.arguments import parse
from opd.plan.job import machine_here, make_job, read_shapes
from opd.plan.planner import make_plan
from scripts.make_demo import HEAD_DIM
from scripts.measure import tools
from scripts.measure.runs import (
    LEARNING_RATE,
    RunFailed,
    byte_tokenizer,
    environment,
    flags,
    run_child,
    silent_model,
    write_prompts,
)

COUNTS = (1, 2, 4, 8)
HIDDEN_SIZES = (1024, 960, 896, 832, 768, 640, 512, 384)  # of the teachers, largest first
LAYERS, VOCAB_SIZE = 8, 512
STUDENT = (2, 128)  # layers, hidden size
PROMPTS_PER_STEP, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 32, 32
# DeepSpeed fills its bucket for gradients at start, by default with more than all teachers weigh.
DS_CONFIG = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000}}
SAMPLE_S = 0.02
BEFORE_ENGINES = "import train_mopd, deepspeed"  # what a run has imported when `prepare` ends


# ---- The meter -----------------------------------------------------------------------------------


def descendants(pid: int) -> set[int]:
    """Processes that `pid` started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                parent = int(Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    found, frontier = set(), [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found.update(frontier)
    return found


def resident_bytes(pids: set[int]) -> int:
    """Resident memory of processes together; those that have ended hold none."""
    lines = set()  # between vfork and exec a child is its parent's memory, to the byte
    for pid in pids:
        try:
            lines.add(Path(f"/proc/{pid}/statm").read_text())
        except OSError:
            continue
    return sum(int(line.split()[1]) for line in lines) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most that this process's descendants held together while the block ran."""

    bytes = 0

    def watch(self, ended: threading.Event) -> None:
        """Samples until `ended`; looks for new processes every 25 samples."""
        pids: set[int] = set()
        samples = 0
        while not ended.wait(SAMPLE_S):
            if samples % 25 == 0:
                pids = descendants(os.getpid())
            samples += 1
            self.bytes = max(self.bytes, resident_bytes(pids))


@contextmanager
def peak_of_children():
    """`with peak_of_children() as peak: ...`, then `peak.bytes`."""
    peak, ended = Peak(), threading.Event()
    thread = threading.Thread(target=peak.watch, args=(ended,), daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join(timeout=60)


# ---- Models and prompts --------------------------------------------------------------------------


def save_model(path: Path, layers: int, hidden_size: int, tokenizer, seed: int) -> int:
    """A random model; bytes of its base model."""
    model = silent_model(layers, hidden_size, tokenizer, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return sum(p.numel() * p.element_size() for p in model.base_model.parameters())


def write_models(root: Path, hidden_sizes: list[int], layers: int) -> list[int]:
    """`student`, `teacher_0` ..., `prompts_N.jsonl` for each N, `ds_config.json`; the teachers'
    bytes.
    """
    (root / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    tokenizer = byte_tokenizer(VOCAB_SIZE)
    save_model(root / "student", *STUDENT, tokenizer, seed=0)
    for count in range(1, len(hidden_sizes) + 1):
        domains = tuple(f"teacher_{i}" for i in range(count))
        write_prompts(root / f"prompts_{count}.jsonl", 4 * PROMPTS_PER_STEP, PROMPT_TOKENS, domains)
    return [
        save_model(root / f"teacher_{i}", layers, size, tokenizer, seed=1 + i)
        for i, size in enumerate(hidden_sizes)
    ]


# ---- The runs ------------------------------------------------------------------------------------


def flags_of(root: Path, count: int, residency: str, steps: int) -> list[str]:
    """What train_mopd.py, and the planner, are given."""
    return [f"--teacher=teacher_{i}={root / f'teacher_{i}'}" for i in range(count)] + flags(
        student_model=root / "student",
        data=root / f"prompts_{count}.jsonl",
        teacher_backend="hf",
        teacher_residency=residency,
        dtype="float32",
        output_dir=root / f"{residency}_{count}",
        ds_config=root / "ds_config.json",
        num_steps=steps,
        enforce_eager=True,
        prompts_per_step=PROMPTS_PER_STEP,
        micro_batch_size=PROMPTS_PER_STEP,
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=RESPONSE_TOKENS,
        rollout_kv_cache_gib=0.05,
        parity_every=0,
        rollout_every=0,
        learning_rate=LEARNING_RATE,
        save_every=steps + 1,
    )


def peak_of(command: list[str], log: Path, threads: int) -> int:
    """Peak bytes of a child process and its children."""
    with peak_of_children() as peak:
        run_child([sys.executable, *command], log, environment(threads))
    return peak.bytes


def measure(root: Path, steps: int, threads: int, hidden_sizes: list[int], layers: int) -> dict:
    """All runs, one after the other."""
    sizes = write_models(root, hidden_sizes, layers)
    runs = [("disk", count) for count in COUNTS if count <= len(sizes)] + [
        ("host", min(4, len(sizes)))
    ]
    peaks: dict[tuple[str, int], int] = {}
    for residency, count in runs:
        command = ["train_mopd.py", *flags_of(root, count, residency, steps)]
        peaks[residency, count] = peak_of(command, root / "log.txt", threads)
        tools.say(
            f"{residency}, {count} of {sum(sizes[:count]) >> 20} MiB: peak "
            f"{peaks[residency, count] >> 20} MiB"
        )
    before = peak_of(["-c", BEFORE_ENGINES], root / "log.txt", threads)
    predicted = (
        before + predicted_growth(flags_of(root, 4, "disk", steps)) if len(sizes) >= 4 else None
    )
    return {
        **summary(peaks, sizes),
        **planned(predicted, peaks.get(("disk", 4))),
        "before_engines": before,
    }


def summary(peaks: dict[tuple[str, int], int], sizes: list[int]) -> dict:
    """Peaks, their ratio, and growth over the weights that came."""
    one, four, host = (peaks.get(key) for key in (("disk", 1), ("disk", 4), ("host", 4)))
    came = sum(sizes[1:4])

    def growth(peak: int | None) -> float | None:
        return None if peak is None else round((peak - one) / came, 3)

    return {
        **{f"peak_{count}": peaks.get(("disk", count)) for count in COUNTS},
        "flatness": None if four is None else round(four / one, 4),
        "host_4": host,
        "growth_4": growth(four),
        "host_growth_4": growth(host),
        "teacher_bytes": sizes,
    }


def predicted_growth(arguments: list[str]) -> int:
    """Bytes that the planner expects a run to add at its peak to what it holds when
    `prepare` ends.
    """
    cfg = parse(train_mopd.Config, arguments)
    job = make_job(cfg, *read_shapes(cfg), machine_here(1))
    return make_plan(job).peak


def planned(predicted: int | None, measured: int | None) -> dict:
    """The prediction and its relative error."""
    known = predicted is not None and measured is not None
    return {
        "predicted_4": predicted,
        "planner_error": round(predicted / measured - 1, 4) if known else None,
    }


def main() -> int:
    parser = tools.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--hidden_sizes",
        type=int,
        nargs="+",
        default=list(HIDDEN_SIZES),
        help="teachers, largest first",
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    if args.hidden_sizes != sorted(args.hidden_sizes, reverse=True):
        parser.error(f"--hidden_sizes {args.hidden_sizes}: the largest comes first")
    if any(size % HEAD_DIM for size in args.hidden_sizes):
        parser.error(f"--hidden_sizes {args.hidden_sizes}: each must be a multiple of {HEAD_DIM}")
    with tempfile.TemporaryDirectory(prefix="bench_colocation_") as directory:
        result = measure(Path(directory), args.steps, args.threads, args.hidden_sizes, args.layers)
    if args.json:
        tools.print_json(
            {**result, "steps": args.steps, **tools.machine_facts("cpu"), "threads": args.threads}
        )
    else:
        print(tools.table([{"": name, "value": value} for name, value in result.items()]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as failure:
        sys.exit(f"error: {failure}")
