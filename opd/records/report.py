"""The report: how much of the gap between the student and its teachers a run closed, per domain.

Scores are per prompt and paired: index i of `before`, `after` and `teacher` speaks about the same
held-out prompt. `python -m opd.report RUN_DIR` prints the report of a finished run.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.records.files import replace_text

RESAMPLES = 2000
BOOTSTRAP_SEED = 0

Scores = Mapping[str, Sequence[float]]  # domain -> score of each prompt


def recovery_report(
    before: Scores, after: Scores, teacher: Scores, *, steps: int, wall_s: float
) -> dict[str, Any]:
    """`report.json`: mean scores per domain, recovery = (after - before) / (teacher - before), and
    its 95 % interval.

    A domain that `teacher` lacks has null for the teacher, the recovery and the interval; a teacher
    that scores exactly what the student scored before leaves no gap, and both figures are null.

    Raises ValueError when the domains or the number of prompts differ, or a score is not finite.
    """
    if before.keys() != after.keys():
        raise ValueError(
            f"report: scores before have the domains {sorted(before)}, after {sorted(after)}; "
            "evaluate both alike"
        )
    if not teacher.keys() <= before.keys():
        unknown = sorted(teacher.keys() - before.keys())
        raise ValueError(
            f"report: teacher scores for {unknown}, which the student was not evaluated on"
        )
    domains = {
        name: _domain_report(name, before[name], after[name], teacher.get(name)) for name in before
    }
    return {"domains": domains, "steps": int(steps), "wall_s": float(wall_s)}


def _domain_report(
    domain: str, before: Sequence[float], after: Sequence[float], teacher: Sequence[float] | None
) -> dict[str, Any]:
    rows = [before, after] if teacher is None else [before, after, teacher]
    lengths = [len(row) for row in rows]
    if min(lengths) == 0 or min(lengths) != max(lengths):
        raise ValueError(
            f"report: {domain}: {lengths} scores before, after and of the teacher; score the same "
            "prompts"
        )
    scores_RP = np.asarray(rows, dtype=np.float64)  # R rows, P prompts
    if not np.isfinite(scores_RP).all():
        raise ValueError(f"report: {domain}: a score is not finite")
    means = [math.fsum(row) / len(row) for row in scores_RP]
    return {
        "student_before": means[0],
        "student_after": means[1],
        "teacher": None if teacher is None else means[2],
        "recovery": None if teacher is None else _recovery(*means),
        "ci95": None
        if teacher is None or _recovery(*means) is None
        else _bootstrap_interval(scores_RP),
        "n": lengths[0],
    }


def _recovery(before: float, after: float, teacher: float) -> float | None:
    # The tolerance is for means of fractions, whose last bits depend on the order of the prompts.
    return (
        None
        if math.isclose(teacher, before, rel_tol=1e-12, abs_tol=1e-12)
        else (after - before) / (teacher - before)
    )


def _bootstrap_interval(scores_RP: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles of the recovery over resampled prompts (Efron 1979, percentile
    interval).

    One draw of prompts serves all three rows, because their scores are paired. Resamples without a
    gap have no recovery and are left out.
    """
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    num_prompts = scores_RP.shape[1]
    recoveries = []
    for _ in range(RESAMPLES):
        means_R = scores_RP[:, generator.integers(num_prompts, size=num_prompts)].mean(axis=1)
        recoveries.append(_recovery(*means_R.tolist()))
    return np.percentile([r for r in recoveries if r is not None], [2.5, 97.5]).tolist()


def render_report(report: dict[str, Any]) -> str:
    """The report as a table in plain text."""
    header = ("domain", "n", "before", "after", "teacher", "recovery", "95 % interval")
    rows = [header, *(_cells(domain, entry) for domain, entry in report["domains"].items())]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    wall = (
        f"{report['steps']} steps in {report['wall_s']:,.0f} s; recovery is (after - before) / "
        "(teacher - before)"
    )
    return "\n".join([lines[0], rule, *lines[1:], rule, wall])


def _cells(domain: str, entry: dict[str, Any]) -> tuple[str, ...]:
    scores = (
        "-" if entry[k] is None else f"{entry[k]:.3f}"
        for k in ("student_before", "student_after", "teacher")
    )
    recovery = "-" if entry["recovery"] is None else f"{entry['recovery']:.1%}"
    interval = (
        "-" if entry["ci95"] is None else " to ".join(f"{bound:.1%}" for bound in entry["ci95"])
    )
    return (domain, str(entry["n"]), *scores, recovery, interval)


def write_report(run_dir: Path, report: dict[str, Any]) -> Path:
    """Writes `report.json`, whole or not at all; returns its path."""
    path = Path(run_dir) / "report.json"
    replace_text(path, json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def report_command(argv: Sequence[str]) -> int:
    """Prints the report of the run directory in `argv`; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m opd.report RUN_DIR", file=sys.stderr)
        return 2
    run_dir = Path(argv[0])
    path = run_dir / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(
            f"RUN_DIR {run_dir}: no report.json; give the --output_dir of a run that has finished",
            file=sys.stderr,
        )
        return 2
    except (OSError, ValueError) as error:
        print(f"RUN_DIR {run_dir}: report.json cannot be read: {error}", file=sys.stderr)
        return 2
    print(render_report(report))
    print(f"\nreport:  {path}\ncurves:  tensorboard --logdir {run_dir / 'tb'}")
    return 0
