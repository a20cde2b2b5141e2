"""How much faster asynchronous distillation is than synchronous, and how long the trainer waits.

* Simulated (`scripts/measure/async_simulation.py`): responses with a long tail on 8, 64 and 1,024
  GPUs, the same samples, updates and GPUs on all sides. *Colocated*: all GPUs write, then score,
  then train. *Split*: the GPUs of the asynchronous run, but every step waits for the one before.
  Reported is the fastest split that leaves the trainer idle for less than a tenth of the time.
* Measured (`--measured`): real runs of the trainer on this machine, on tiny models whose responses
  have a long tail (`scripts/measure/async_runs.py`), and the simulation of the same runs with the
  rates that were measured in them (`async_check.py`). `--runs RUN_SYNC RUN_ASYNC` reads the speed
  of two runs of your own instead.
* Learned (`--recovery`): what a synchronous and an asynchronous run recovered from equally many
  samples.

    python scripts/bench_async.py --json                         # three minutes of one core
    python scripts/bench_async.py --json --gpus 8 --measured     # and eight minutes of two
    python scripts/bench_async.py --plot docs/async.png --gpus 8
    python scripts/bench_async.py --gpus --recovery  # quickstart.sh and demos/mopd_async.py
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from scripts.measure import async_check, async_runs, run_pairs, tools
from scripts.measure.async_model import (
    Rates,
    Result,
    Rule,
    Workload,
    lognormal_lengths,
    synchronous,
)
from scripts.measure.async_simulation import Choice, asynchronous, choose, promising, splits

# A student of 7.6 billion parameters (Qwen2.5-7B) in bfloat16 and teachers of its size, on H100s:
# 3.35 TB/s, 989 TFLOP/s. Derived from data sheets, with assumed efficiencies; none of it is
# measured.
RATES = Rates(
    decode_a=7.0e-3,  # 15.2 GB of weights at 80 % of the bandwidth, and 1.3 ms around it
    # 57 KB of KV cache for each of about 4,000 tokens at 80 %, and 2 FLOP a parameter at half speed
    decode_b=1.2e-4,
    max_batch=256,  # chosen below; as many average responses as 57 GB of KV cache hold
    score=3.1e-5,  # 2 FLOP a parameter at half speed
    train=1.54e-4,  # 8 FLOP a parameter (with recomputed activations) at 40 %
    publish=3.0,  # gather, and 15.2 GB into shared memory at 5 GB/s
    load=3.0,  # the same way back
)
# tokens; see docs/benchmarks.md for where the shape comes from
MEAN, SIGMA, MAXIMUM, PROMPT = 5000, 1.0, 32_768, 512
# GPUs -> samples of a step (64 to 1,024 prompts of 8 responses), steps, portions in which GPUs are
# dealt out
SIZES = {8: (512, 100, 8), 64: (2048, 40, 16), 1024: (8192, 12, 16)}
STALENESS, BATCHES, IDLE = (2, 4, 8), (64, 128, 256), 0.10
CANDIDATES = 5  # splits that are simulated; the others are slower by arithmetic
RIVALS = {
    "strict order": {},
    "strict, drained at a push": {"at_push": "drain"},
    "strict, restarted at a push": {"at_push": "restart"},
    "strict, a push to one replica after the other": {"waves": 1 << 20},
    "strict, a push beside training": {"trainer_waits": False},
    "finished first": {"order": "finished"},
    "finished first, stale dropped": {"order": "finished", "drop_stale": True},
}
TAILS = ((0.0, 32_768), (0.5, 32_768), (0.8, 32_768), (1.0, 16_384), (1.0, 32_768), (1.2, 32_768))


def workload(
    gpus: int, steps: int, *, sigma: float = SIGMA, maximum: int = MAXIMUM, seed: int = 0
) -> Workload:
    """The workload for this many GPUs; its lengths go on beyond what strict order needs, for the
    rival rule.
    """
    batch = SIZES[gpus][0]
    lengths = lognormal_lengths(batch * steps * 2, MEAN, sigma, maximum, seed)
    return Workload(lengths, batch, steps, PROMPT)


def run_choice(work: Workload, rates: Rates, choice: Choice, **changes) -> Result:
    """The asynchronous run of a choice; `changes` are those of its rule."""
    rates = replace(rates, max_batch=choice.max_batch)
    return asynchronous(
        work, rates, choice.split, Rule(**{"max_staleness": choice.max_staleness, **changes})
    )


def row(gpus: int, work: Workload, rates: Rates, choice: Choice) -> dict:
    """A line of the table: speed-ups over both synchronous runs, each with the batch that suits it
    best.
    """
    run = choice.result
    colocated = min(
        synchronous(work, replace(rates, max_batch=batch), gpus).seconds for batch in BATCHES
    )
    split = min(
        synchronous(work, replace(rates, max_batch=batch), choice.split).seconds
        for batch in BATCHES
    )
    return {
        "gpus": gpus,
        "B": work.batch,
        "split": f"{choice.split.rollout}+{choice.split.teacher}+{choice.split.trainer}",
        "staleness": choice.max_staleness,
        "max_batch": choice.max_batch,
        "s/step": round(run.seconds / work.steps, 1),
        "vs_colocated": round(colocated / run.seconds, 2),
        "vs_split": round(split / run.seconds, 2),
        "trainer_idle": round(run.trainer_idle, 3),
        "publishing": round(run.trainer_publishing, 3),
        "rollout_idle": round(run.rollout_idle, 3),
        "queue": round(run.queue_mean),
    }


# ---- Simulated -----------------------------------------------------------------------------------


def simulate(gpus: int, steps: int, seed: int, rates: Rates) -> tuple[dict, Workload, Choice]:
    """The best split for this many GPUs: its line of the table, what it ran, what was chosen."""
    work = workload(gpus, steps, seed=seed)
    small_batches = replace(rates, max_batch=min(BATCHES))  # what a long tail leaves on a replica
    candidates = promising(splits(gpus, SIZES[gpus][2]), work, small_batches, CANDIDATES)
    choice = choose(
        work, rates, candidates, staleness=STALENESS, batches=BATCHES, max_trainer_idle=IDLE
    )
    return row(gpus, work, rates, choice), work, choice


def by_staleness(work: Workload, rates: Rates, choice: Choice, bounds: range) -> list[dict]:
    """What max_staleness buys, at the chosen split and batch."""
    colocated = synchronous(work, rates, choice.split.gpus).seconds
    rows = []
    for bound in bounds:
        run = run_choice(work, rates, choice, max_staleness=bound)
        mean = sum(age * count for age, count in run.staleness.items()) / run.staleness.total()
        rows.append(
            {
                "max_staleness": bound,
                "vs_colocated": round(colocated / run.seconds, 2),
                "trainer_idle": round(run.trainer_idle, 3),
                "rollout_idle": round(run.rollout_idle, 3),
                "mean_staleness": round(mean, 2),
                "queue": round(run.queue_mean),
            }
        )
    return rows


def by_tail(gpus: int, steps: int, seed: int, rates: Rates, choice: Choice) -> list[dict]:
    """Other tails of the same mean before the cut; the split stays that of the standard
    workload.
    """
    rows = []
    for sigma, maximum in TAILS:
        work = workload(gpus, steps, sigma=sigma, maximum=maximum, seed=seed)
        run = run_choice(work, rates, choice)
        colocated = synchronous(work, rates, gpus).seconds
        rows.append(
            {
                "sigma": sigma,
                "maximum": maximum,
                "mean": round(float(work.lengths.mean())),
                "p99/p50": round(float(np.divide(*np.percentile(work.lengths, (99, 50)))), 1),
                "at_maximum": round(float((work.lengths == maximum).mean()), 4),
                "vs_colocated": round(colocated / run.seconds, 2),
                "trainer_idle": round(run.trainer_idle, 3),
            }
        )
    return rows


def by_rule(work: Workload, rates: Rates, choice: Choice) -> list[dict]:
    """Strict order against its rivals.

    Speed is in tokens: a rule that prefers short responses has less to train on.
    """
    rows = []
    for name, changes in RIVALS.items():
        run = run_choice(work, rates, choice, **changes)
        indices = [index for step in run.trained for index in step]
        lengths, sampled = work.lengths[indices], work.lengths[: max(indices) + 1]
        ages = sorted(run.staleness.elements())
        rows.append(
            {
                "rule": name,
                "tokens/s": round(float(lengths.sum()) / run.seconds),
                "trained_over_sampled": round(float(lengths.mean() / sampled.mean()), 3),
                "trained_p99": round(float(np.percentile(lengths, 99))),
                "largest_staleness": ages[-1],
                "dropped": run.dropped,
                "restarted": run.restarts,
                "trainer_idle": round(run.trainer_idle, 3),
                "publishing": round(run.trainer_publishing, 3),
            }
        )
    return rows


# ---- Measured ------------------------------------------------------------------------------------


def measure(setting: async_runs.Setting, rounds: int) -> dict:
    """Real runs on this machine, and what the simulation says of them."""
    runs = async_runs.run_all(setting, rounds)
    # of 15 minutes: about 2 is this benchmark's own
    load = {"load_average": round(os.getloadavg()[2], 1)}
    return {
        **summary(runs, setting),
        "rounds": rounds,
        **asdict(setting),
        **tools.machine_facts("cpu"),
        **load,
    }


def summary(runs: dict[str, list[async_runs.Measured]], setting: async_runs.Setting) -> dict:
    """The figures of all sides.

    The speed-up is over the synchronous run in one process, as on one set of devices.
    """
    sides = {side: async_runs.figures(of_side, setting) for side, of_side in runs.items()}
    lengths = np.concatenate([run.lengths_IB for run in runs["sync"]])
    return {
        "speedup_measured": tools.ratio(sides["sync"]["step_s"], sides["async"]["step_s"]),
        "speedup_measured_vs_split": tools.ratio(
            sides["split"]["step_s"], sides["async"]["step_s"]
        ),
        "trainer_idle_measured": sides["async"]["trainer_idle"],
        **async_check.check(runs, setting),
        "sides": [{"side": side, **values} for side, values in sides.items()],
        "lengths": async_runs.length_figures(lengths, setting.max_response_tokens),
    }


# ---- The plot ------------------------------------------------------------------------------------


def save_plot(path: Path, staleness: list[dict], tails: list[dict], caption: str) -> None:
    """Speed-up and idle fractions against max_staleness; speed-up against the tail."""
    bounds = [point["max_staleness"] for point in staleness]
    tails = [point for point in tails if point["maximum"] == MAXIMUM]
    sigmas = [point["sigma"] for point in tails]
    with tools.picture(path, 3, (12, 3.4)) as (figure, (left, middle, right)):
        left.plot(bounds, [point["vs_colocated"] for point in staleness], "o-")
        left.set(title="times as fast as colocated", xlabel="max_staleness")
        for key in ("trainer_idle", "rollout_idle"):
            shares = [point[key] for point in staleness]
            middle.plot(bounds, shares, "o-", label=key.replace("_", " "))
        middle.set(title="idle fraction", xlabel="max_staleness", ylim=(0, 1))
        middle.legend()
        right.plot(sigmas, [point["vs_colocated"] for point in tails], "o-")
        right.set(title="times as fast as colocated", xlabel="sigma of the lognormal lengths")
        for axis in (left, right):
            axis.axhline(1, color="tab:gray", linestyle="--")
            axis.set_ylim(bottom=0)
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)
        figure.suptitle(caption, fontsize=9)


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tools.make_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="write a PNG here, for example docs/async.png")
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="*",
        choices=sorted(SIZES),
        default=sorted(SIZES),
        help="none: no simulation",
    )
    parser.add_argument(
        "--steps", type=int, help="simulated steps (default: 100, 40 and 12 for the three sizes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the response lengths")
    parser.add_argument(
        "--rates",
        type=json.loads,
        default={},
        help='JSON, such as {"train": 2e-4}: rates of your own',
    )
    real = parser.add_mutually_exclusive_group()
    real.add_argument(
        "--measured",
        action="store_true",
        help="real runs on this machine, eight minutes on two cores",
    )
    real.add_argument(
        "--runs",
        type=Path,
        nargs=2,
        metavar=("RUN_SYNC", "RUN_ASYNC"),
        help="measured before, elsewhere",
    )
    parser.add_argument("--rounds", type=int, default=2, help="of --measured: runs of each side")
    parser.add_argument(
        "--recovery",
        type=Path,
        nargs="*",
        metavar="RUN_DIR",
        help="a synchronous and an asynchronous run; alone: those of scripts/quickstart.sh and "
        "scripts/demos/mopd_async.py",
    )
    return parser


def parse_arguments() -> argparse.Namespace:
    """A mistake ends the process."""
    parser = make_parser()
    args = parser.parse_args()
    if args.steps is not None and args.steps < 2:
        parser.error(f"--steps {args.steps}: take at least 2")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: take at least 1")
    if args.plot and not (args.gpus and find_spec("matplotlib")):
        parser.error(
            f"--plot {args.plot}: "
            f"{'pip install matplotlib' if args.gpus else 'nothing is simulated; --gpus 8'}"
        )
    if unknown := set(args.rates) - set(asdict(RATES)):
        parser.error(f"--rates {sorted(unknown)}: take from {', '.join(asdict(RATES))}")
    if args.recovery is not None and len(args.recovery) not in (0, 2):
        parser.error(
            f"--recovery {' '.join(map(str, args.recovery))}: give two run directories, or none "
            "for the demo's"
        )
    try:
        args.speed = run_pairs.speed(*args.runs) if args.runs else {}
        pair = args.recovery or (run_pairs.QUICKSTART, run_pairs.ASYNC)
        args.learned = {} if args.recovery is None else {"recovery": run_pairs.recovery(*pair)}
    except ValueError as error:
        parser.error(str(error))
    return args


def simulated(args: argparse.Namespace) -> tuple[dict, dict]:
    """(the two figures, tables) of the sizes asked for.

    The detailed tables are those of the smallest.
    """
    if not args.gpus:
        return {"speedup_simulated_8gpu": None, "trainer_idle_simulated": None}, {}
    rates, sizes = replace(RATES, **args.rates), {}
    for gpus in sorted(args.gpus):
        sizes[gpus] = simulate(gpus, args.steps or SIZES[gpus][1], args.seed, rates)
        tools.say(f"{gpus} GPUs: {sizes[gpus][0]}")
    gpus = min(sizes)
    _, work, choice = sizes[gpus]
    tables = {
        "sizes": [line for line, _, _ in sizes.values()],
        "staleness": by_staleness(work, rates, choice, range(9)),
        "tails": by_tail(gpus, work.steps, args.seed, rates, choice),
        "rules": by_rule(work, rates, choice),
    }
    if args.plot:
        save_plot(
            args.plot,
            tables["staleness"],
            tables["tails"],
            f"simulated, {gpus} GPUs: {choice.split}",
        )
    eight = sizes[8][0] if 8 in sizes else {}
    return {
        key: eight.get(of)
        for key, of in (
            ("speedup_simulated_8gpu", "vs_colocated"),
            ("trainer_idle_simulated", "trainer_idle"),
        )
    }, tables


def main() -> int:
    """Tables, or one JSON object."""
    args = parse_arguments()
    result, tables = simulated(args)
    result |= {"speedup_measured": None, "trainer_idle_measured": None, **args.speed}
    if args.measured:
        result |= measure(async_runs.Setting(), args.rounds)
    if args.json:
        assumed = {
            "rates": asdict(replace(RATES, **args.rates)),
            "mean": MEAN,
            "sigma": SIGMA,
            "maximum": MAXIMUM,
        }
        tools.print_json({**result, **args.learned, **tables, **(assumed if tables else {})})
        return 0
    parts = [
        *tables.values(),
        *([result.pop("sides")] if args.measured else []),
        *args.learned.values(),
    ]
    print(
        "\n\n".join(
            [*map(tools.table, parts), *(f"{key}: {value}" for key, value in result.items())]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
