"""Quality per sample: what each form of the loss makes of the same responses' worth of training.

The demo (`scripts/make_demo.py`) is trained once per form, from the same student, with the same
prompts, seeds and learning rate; only what the loss sums over at each position differs:

* ``full``: the reverse KL over the whole vocabulary;
* ``union_topk``: over the top tokens of student and teacher, the exact rest in a bucket;
* ``teacher_topk_*``: over the teacher's top tokens, with each of the four tails;
* ``sampled``: the policy gradient of the same reverse KL, which looks at the sampled token alone.

Recovery is the closed share of the gap, (student - before) / (teacher - before), in accuracy on
held-out prompts; a sample is one response. The supports are small next to the demo's vocabulary of
40, as 64 is next to 150,000, so that what they leave out can be seen. One run is one draw: read
differences against the 95 % interval over prompts, or give more seeds.

    python scripts/make_demo.py --output_dir demo
    python scripts/bench_recovery.py --json
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from scripts.measure.runs import RunFailed, environment, flags, run_child, steps_of
from scripts.measure.tools import ROOT, picture, print_json, read_jsonl, say, table

FORMS = {  # form -> the flags of its loss
    "full": {"loss": "reverse_kl", "support": "full"},
    "union_topk": {"loss": "reverse_kl", "support": "union_topk", "tail": "bucket"},
    **{
        f"teacher_topk_{tail}": {"loss": "reverse_kl", "support": "teacher_topk", "tail": tail}
        for tail in ("bucket", "generalized", "renormalize", "truncate")
    },
    "sampled": {"loss": "reverse_kl_pg", "support": "sampled"},
}
TARGET = 0.9  # of recovery
LAST_STEPS = 10  # entropy at the end is a mean over these
DEADLINE_S = 3600  # of one run


# ---- One run -------------------------------------------------------------------------------------


def train(form: str, seed: int, args: argparse.Namespace) -> dict:
    """One run of train_mopd.py; its curve and its report.

    RunFailed with the trainer's own last word.
    """
    run_dir = args.output_dir / form / f"seed_{seed}"
    run_dir.mkdir(parents=True)
    domains = [path.name.removeprefix("teacher_") for path in sorted(args.demo.glob("teacher_*"))]
    command = [sys.executable, "train_mopd.py", *flags(config="scripts/quickstart.yaml")]
    command += flags(**FORMS[form], support_k=args.support_k if "topk" in form else None)
    command += [f"--teacher={domain}={args.demo / f'teacher_{domain}'}" for domain in domains]
    command += flags(
        student_model=args.demo / "student",
        data=args.demo / "train.jsonl",
        eval_data=args.demo / "eval.jsonl",
        output_dir=run_dir / "run",
        seed=seed,
        num_steps=args.steps,
        prompts_per_step=args.prompts_per_step,
        eval_every=max(1, args.steps // args.points),
        save_every=0,
        ds_config="ds_configs/zero0.json",
        rollout_every=0,
    )
    say(f"{form}, seed {seed}: {args.steps} steps")
    run_child(command, run_dir / "log.txt", environment(1), deadline_s=DEADLINE_S)
    return read_run(run_dir / "run", args.prompts_per_step)


def read_run(run_dir: Path, samples_per_step: int) -> dict:
    """Recovery against samples per domain, the report's figures, entropy at the end and the
    milliseconds of a step.
    """
    rows = read_jsonl(run_dir / "metrics.jsonl")
    report = json.loads((run_dir / "report.json").read_text())["domains"]
    marks = [row for row in rows if any(key.startswith("eval/accuracy/") for key in row)]
    steps = steps_of(run_dir)
    entropies = [row["distill/student_entropy"] for row in steps[-LAST_STEPS:]]
    curves = {}
    for domain, figures in report.items():
        accuracies = [row[f"eval/accuracy/{domain}"] for row in marks]
        curves[domain] = [recovery(accuracies[0], now, figures["teacher"]) for now in accuracies]
    return {
        "samples": [row["step"] * samples_per_step for row in marks],
        "curves": curves,
        "report": report,
        "entropy": statistics.mean(entropies),
        "step_ms": 1000 * statistics.median(row["time/step"] for row in steps),
    }


def recovery(before: float, now: float, teacher: float) -> float | None:
    """The closed share of the gap; None where there is none."""
    return None if math.isclose(before, teacher) else (now - before) / (teacher - before)


# ---- One form, all its seeds ---------------------------------------------------------------------


def mean_or_none(values: list[float | None]) -> float | None:
    """Over what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return round(statistics.mean(known), 4) if known else None


def samples_to(target: float, samples: list[int], curve: list[float | None]) -> int | None:
    """Where the curve, straight between its marks, first reaches `target`; None if it does not.

    `samples_to(0.9, [0, 100, 200], [0.0, 0.8, 1.0])` = 150.
    """
    if None in curve:
        return None
    for i, value in enumerate(curve):
        if value >= target:
            if i == 0:
                return samples[0]
            share = (target - curve[i - 1]) / (value - curve[i - 1])
            return round(samples[i - 1] + share * (samples[i] - samples[i - 1]))
    return None


def summary(runs: list[dict]) -> dict:
    """Means over seeds. The interval is over prompts, the mean of the seeds' own intervals."""
    domains = list(runs[0]["curves"])
    curves = {
        d: [
            mean_or_none(list(marks))
            for marks in zip(*(run["curves"][d] for run in runs), strict=True)
        ]
        for d in domains
    }
    samples = runs[0]["samples"]
    reports = {d: [run["report"][d] for run in runs] for d in domains}
    intervals = {d: [report["ci95"] or (None, None) for report in reports[d]] for d in domains}
    return {
        "recovery": {
            d: mean_or_none([report["recovery"] for report in reports[d]]) for d in domains
        },
        "ci95": {
            d: [mean_or_none(list(bounds)) for bounds in zip(*intervals[d], strict=True)]
            for d in domains
        },
        "entropy": mean_or_none([run["entropy"] for run in runs]),
        "samples_to_90": {d: samples_to(TARGET, samples, curves[d]) for d in domains},
        "step_ms": round(statistics.median(run["step_ms"] for run in runs), 1),
        "samples": samples,
        "curves": curves,
        "recovery_of_each_seed": {
            d: [report["recovery"] for report in reports[d]] for d in domains
        },
    }


def table_row(form: str, result: dict) -> dict:
    """A form's line of the printed table."""
    row = {"form": form}
    for domain, value in result["recovery"].items():
        low, high = result["ci95"][domain]
        row[domain] = None if value is None else f"{value:.3f}"
        row[f"{domain} 95 %"] = None if low is None else f"{low:.3f} to {high:.3f}"
    reached = list(result["samples_to_90"].values())
    return {
        **row,
        "entropy": f"{result['entropy']:.3f}",
        f"samples to {TARGET}": None if None in reached else max(reached),
        "step ms": result["step_ms"],
    }


def plot(results: dict[str, dict], path: Path) -> str | None:
    """Recovery against samples: a panel per domain, a curve per form.

    Returns the file's name, None without matplotlib.
    """
    if find_spec("matplotlib") is None:
        say("no plot: pip install matplotlib")
        return None
    domains = list(next(iter(results.values()))["curves"])
    with picture(path, len(domains), (5.5 * len(domains), 4), sharey=True) as (_, axes):
        for axis, domain in zip(axes, domains, strict=True):
            for form, result in results.items():
                curve = [math.nan if value is None else value for value in result["curves"][domain]]
                axis.plot(result["samples"], curve, marker=".", label=form)
            axis.axhline(TARGET, color="grey", linewidth=0.5, linestyle="--")
            axis.set(title=domain, xlabel="samples")
        axes[0].set_ylabel("recovery")
        axes[-1].legend(fontsize="small")
    return str(path)


# ---- All forms -----------------------------------------------------------------------------------


def remove_old_runs(args: argparse.Namespace) -> None:
    """A directory that holds a run would be resumed: only those of the forms that run now go."""
    for form in args.forms:
        directory = args.output_dir / form
        if directory.exists():
            say(f"removing {directory}, an earlier run of this benchmark")
            shutil.rmtree(directory)


def measure(args: argparse.Namespace) -> tuple[dict[str, dict | None], dict[str, str]]:
    """(form -> summary, or None if it failed; form -> reason of the failure)."""
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            form: [pool.submit(train, form, seed, args) for seed in args.seeds]
            for form in args.forms
        }
    results, reasons = {}, {}
    for form, futures in jobs.items():
        try:
            results[form] = summary([future.result() for future in futures])
        except RunFailed as failure:
            results[form], reasons[form] = None, str(failure)
            say(f"{form} did not run: {failure}")
    return results, reasons


def parse() -> argparse.Namespace:
    """A mistake ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "demo", help="what scripts/make_demo.py wrote"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts_per_step", type=int, default=128, help="and responses: one each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--support_k", type=int, default=4, help="tokens of the top-k forms")
    parser.add_argument(
        "--points", type=int, default=6, help="evaluations after the one before training"
    )
    parser.add_argument(
        "--jobs", type=int, choices=[1, 2], default=1, help="runs at a time, one thread each"
    )
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "recovery.png")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "bench_recovery")
    args = parser.parse_args()
    if not (args.demo / "student").is_dir():
        parser.error(
            f"--demo {args.demo}: no demo there; python scripts/make_demo.py --output_dir "
            f"{args.demo}"
        )
    # the trainer runs in the repository, whoever starts this elsewhere
    for name in ("demo", "plot", "output_dir"):
        setattr(args, name, getattr(args, name).resolve())
    return args


def main() -> int:
    args = parse()
    remove_old_runs(args)
    results, reasons = measure(args)
    done = {form: result for form, result in results.items() if result}
    plotted = None
    if done:
        print(table([table_row(form, result) for form, result in done.items()]))
        plotted = plot(done, args.plot)
    if args.json:
        setting = {k: getattr(args, k) for k in ("steps", "prompts_per_step", "seeds", "support_k")}
        print_json({**setting, "plot": plotted, "forms": results, "reasons": reasons})
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
