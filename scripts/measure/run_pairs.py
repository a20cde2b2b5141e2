"""A synchronous and an asynchronous run of one's own, side by side: how fast they were, and how
much they learned.

A user's mistake is a ValueError that names the flag, the directory and the remedy.
"""

import json
from pathlib import Path

import yaml

from scripts.measure import tools

QUICKSTART, ASYNC = Path("runs/quickstart"), Path("runs/async")
MAKERS = {QUICKSTART: "bash scripts/quickstart.sh", ASYNC: "python scripts/demos/mopd_async.py"}


def read_steps(directory: Path) -> list[dict]:
    """The steps of a run but the first, which compiles, and which nothing was written ahead of."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"--runs {directory}: no metrics.jsonl in it; give the --output_dir of a run"
        )
    rows = [row for row in tools.read_jsonl(path) if "time/step" in row][1:]
    if not rows:
        raise ValueError(
            f"--runs {directory}: fewer than two steps in metrics.jsonl; give a longer run"
        )
    return rows


def speed(run_sync: Path, run_async: Path) -> dict[str, float]:
    """`speedup_measured` in samples per second, and `trainer_idle_measured` of the asynchronous
    run.
    """
    rows = {directory: read_steps(directory) for directory in (run_sync, run_async)}
    if "perf/trainer_idle" not in rows[run_async][0]:
        raise ValueError(
            f"--runs {run_async}: no perf/trainer_idle in metrics.jsonl; give a run with --mode "
            "async second"
        )

    def mean(directory: Path, key: str) -> float:
        seconds = sum(row["time/step"] for row in rows[directory])
        return sum(row[key] * row["time/step"] for row in rows[directory]) / seconds

    speedup = tools.ratio(
        *(mean(directory, "perf/samples_per_second") for directory in (run_async, run_sync))
    )
    return {
        "speedup_measured": speedup,
        "trainer_idle_measured": round(mean(run_async, "perf/trainer_idle"), 4),
    }


def read_report(directory: Path) -> dict:
    """`report.json` of a run, and the samples that it was trained on."""
    path, maker = (
        directory / "report.json",
        MAKERS.get(directory, "give the --output_dir of a run that has ended"),
    )
    if not path.is_file():
        raise ValueError(f"--recovery {directory}: no report.json in it; {maker}")
    report = json.loads(path.read_text())
    cfg = yaml.safe_load((directory / "config.yaml").read_text())
    return {**report, "samples": report["steps"] * cfg["prompts_per_step"] * cfg["num_generations"]}


def recovery(run_sync: Path, run_async: Path) -> list[dict]:
    """Recovery and 95 % interval of both runs, domain by domain, after equally many steps and
    samples.
    """
    sync, ahead = read_report(run_sync), read_report(run_async)
    for unit in ("steps", "samples"):
        if sync[unit] != ahead[unit]:
            raise ValueError(
                f"--recovery {run_sync} {run_async}: {sync[unit]} and {ahead[unit]} {unit}; give "
                "two runs of equal length"
            )
    if sync["domains"].keys() != ahead["domains"].keys():
        names = " and ".join(",".join(report["domains"]) for report in (sync, ahead))
        raise ValueError(
            f"--recovery {run_sync} {run_async}: domains {names}; give two runs on the same data"
        )
    rows = []
    for domain, entry in sync["domains"].items():
        row = {"domain": domain, "steps": sync["steps"], "samples": sync["samples"]}
        for side, figures in (("sync", entry), ("async", ahead["domains"][domain])):
            known = figures["recovery"] is not None  # not where there was no gap, or no teacher
            row[side] = round(figures["recovery"], 4) if known else None
            row[f"{side}_ci95"] = [round(bound, 4) for bound in figures["ci95"]] if known else None
        rows.append(row)
    return rows
