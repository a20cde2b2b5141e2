"""Which samples a run was trained on: `ledger_samples.jsonl`, one line per sample, for comparing a
struck run with another.

A line is written after the optimizer step that used the sample, and before the step's metrics and
checkpoint. On a resume the lines beyond the checkpoint go, because the weights that knew those
samples are gone. So a sample stands there exactly if the weights of the run have seen it, and once,
however often the run was killed.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.distributed import agree_on_error, gather_objects, rank
from opd.faults import fault_point
from opd.records.files import append_text, json_line, parse_row, replace_text
from opd.types import Rollout, TeacherScores

FILE = "ledger_samples.jsonl"


class SampleLedger:
    """Writes the samples of each trained step on rank 0."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / FILE

    def record(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends every rank's rows of a step, in sample order, with one sync to the disk.

        Collective.
        """
        gathered = [row for part in gather_objects(list(rows)) for row in part]
        with agree_on_error(f"writing {self.path}"):
            fault_point("ledger.before_write")
            if rank() == 0:
                append_text(self.path, "".join(map(json_line, sorted(gathered, key=_place))))
            fault_point("ledger.written")

    def truncate(self, step: int) -> None:
        """Forgets what a run that is resumed at `step` trained on later; -1 forgets all."""
        if rank() == 0 and self.path.exists():
            kept = [row for row in read(self.path) if row["step"] <= step]
            replace_text(self.path, "".join(map(json_line, kept)))


def sample_rows(
    rollouts: Sequence[Rollout], scores: Sequence[Sequence[TeacherScores]], *, step: int
) -> list[dict[str, Any]]:
    """One row per rollout, with the teachers that did score it.

    `step` counts optimizer steps as `Metrics` does: from 1.
    """
    return [
        {
            "id": rollout.sample_id,
            "prompt_id": rollout.prompt.prompt_id,
            "domain": rollout.prompt.domain,
            "teachers": [score.teacher for score in own],
            "policy_version": rollout.policy_version,
            "tokens": token_hash(rollout),
            "step": step,
        }
        for rollout, own in zip(rollouts, scores, strict=True)
    ]


def token_hash(rollout: Rollout) -> str:
    """First 16 hexadecimal digits of the SHA-256 of prompt and response, token ids as little-endian
    int32.
    """
    ids = np.asarray([*rollout.prompt.token_ids, *rollout.response_ids], dtype="<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger, without a last line that a crash cut short.

    ValueError for any other line that is no row.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    rows = [parse_row(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise ValueError(f"{path}: line {rows.index(None) + 1} is no row of a sample ledger")
    return rows


def differences(expected: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """How one ledger differs from another, a line each: samples lost, added, duplicated, or not the
    same.
    """
    counts = Counter(row["id"] for row in found)
    by_id = {row["id"]: row for row in found}
    known = {row["id"]: row for row in expected}
    problems = [
        f"{sample}: trained on {count} times" for sample, count in counts.items() if count > 1
    ]
    problems += [f"{sample}: lost" for sample in known if sample not in by_id]
    problems += [f"{sample}: not expected" for sample in by_id if sample not in known]
    for sample in known.keys() & by_id.keys():
        for key in sorted(known[sample].keys() | by_id[sample].keys()):
            one, other = known[sample].get(key), by_id[sample].get(key)
            if one != other:
                problems.append(f"{sample}: {key} is {other!r}, expected {one!r}")
    return sorted(problems)


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """Sorts "9/0/1" before "10/0/0"."""
    return tuple(map(int, row["id"].split("/")))
