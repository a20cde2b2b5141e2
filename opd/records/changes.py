"""What differs between a run and the checkpoint that it continues, and what of it was wanted.

`changes.jsonl` of the run directory keeps the wanted ones: {step, name, old, new, time}. `step` is
the last one that the old value has trained.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.distributed import rank
from opd.records.checkpoint import CHECKPOINT_MANIFEST
from opd.records.files import json_line, parse_row, replace_text

CHANGES_FILE = "changes.jsonl"
ABSENT = "absent"


@dataclass(frozen=True)
class FlagChange:
    """A value of the fingerprint that is not that of the checkpoint."""

    name: str  # with its part, as in optim.learning_rate
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} {_short(self.old)} -> {_short(self.new)}"


# What a name of the fingerprint stands for, where its flag may be the same.
ASIDES = {"data": " (rows, and what columns, template and system prompt make of them)"}


def check_fingerprint(
    path: Path,
    fingerprint: dict[str, Any],
    allowed: Collection[str] = (),
    flag_of: Callable[[str], str | None] = lambda name: None,
) -> list[FlagChange]:
    """The wanted changes of a run against the checkpoint that it continues.

    `flag_of` gives the name under which a value of the fingerprint may change, None if it may not;
    `allowed` are names that were given. Raises ValueError for any other difference.
    """
    saved = _flatten(json.loads((path / CHECKPOINT_MANIFEST).read_text())["fingerprint"])
    now = _flatten(json.loads(json.dumps(fingerprint)))
    differing = [
        FlagChange(name, saved.get(name, ABSENT), now.get(name, ABSENT))
        for name in [*now, *(n for n in saved if n not in now)]
        if name not in saved or name not in now or saved[name] != now[name]
    ]
    refused = [c for c in differing if flag_of(c.name) not in allowed]
    if not refused:
        return differing
    first = next((c for c in refused if flag_of(c.name) is None), refused[0])
    if flag_of(first.name) is None:
        remedy = "restore it, or start anew in another --output_dir"
    else:
        flags = ",".join(dict.fromkeys(flag_of(c.name) or "" for c in refused))
        remedy = (
            f"restore it, continue with the new value by --allow_change {flags}, or start anew in "
            "another --output_dir"
        )
    raise ValueError(
        f"--resume: `{first.name}`{ASIDES.get(first.name, '')} differs from the checkpoint: "
        f"{_short(first.old)} there, "
        f"{_short(first.new)} now; {remedy} ({path})"
    )


def record_changes(run_dir: Path, step: int, changes: Collection[FlagChange]) -> None:
    """Rank 0 keeps what changes behind `step`. Earlier lines from there on never came to pass: the
    run goes back behind them.
    """
    path = Path(run_dir) / CHANGES_FILE
    if rank() != 0 or not (changes or path.exists()):
        return
    rows = [parse_row(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in rows if row is not None and row["step"] < step]
    moment = time.strftime("%Y-%m-%dT%H:%M:%S")
    kept += [
        {"step": step, "name": c.name, "old": c.old, "new": c.new, "time": moment} for c in changes
    ]
    replace_text(path, "".join(map(json_line, kept)))


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"teachers": {"math": x}} -> {"teachers.math": x}; an empty mapping is a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    nested = [
        _flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items()
    ]
    return {name: value for part in nested for name, value in part.items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        return text[:12]
    return (
        text
        if len(text) <= 60
        else f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    )
