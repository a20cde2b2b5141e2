"""Teachers that are the student as it was: `self@0`, `self@-K`, `self@ema:DECAY`.

What is wrong with an entry that asks for one is a ValueError with one line.
"""

import re
from collections.abc import Sequence

from opd.config import GIB, SELF, TeacherSpec

START = f"{SELF}0"
# a decay lies between 0 and 1
_FORM = re.compile(r"self@(0|-[1-9]\d*|ema:0?\.\d*[1-9]\d*)")
MOST_STEPS_BACK = 16


def check_past(spec: TeacherSpec, where: str) -> None:
    """The form of an entry whose model begins with `self@`; nothing of others."""
    named = spec.named_model
    if not named.startswith(SELF):
        return
    if not _FORM.fullmatch(named):
        raise ValueError(
            f"{where}: model {named}: write self@0 (the student as it started), self@-K (K steps "
            "ago) or self@ema:DECAY (its moving average, such as self@ema:.99)"
        )
    if spec.is_served or spec.adapter:
        given = "urls" if spec.is_served else "adapter"
        raise ValueError(f"{where}: model {named}: it is the student here; remove {given}")
    if named != START and spec.backend != "hf":
        raise ValueError(
            f"{where}: model {named}: its weights change at every step, which backend hf takes; "
            "set `backend: hf`"
        )


def check_past_of_async(teachers: Sequence[TeacherSpec]) -> None:
    """ValueError for a teacher that changes with the steps: servers write for several of them."""
    for spec in teachers:
        if spec.named_model.startswith(SELF) and spec.named_model != START:
            raise ValueError(
                f"--mode async: teacher {spec.name} is {spec.named_model}, and responses of one "
                "step come from several; use --mode sync, or self@0"
            )


def check_steps_back(spec: TeacherSpec, student_bytes: int) -> None:
    """ValueError for more copies of the student than are kept."""
    steps = -int(spec.past) if spec.past.startswith("-") else 0
    if steps > MOST_STEPS_BACK:
        size = steps * student_bytes / GIB
        raise ValueError(
            f"--teacher {spec.name} {spec.named_model}: {steps} copies of the student are "
            f"{size:.1f} GiB in every process; at most {MOST_STEPS_BACK}, or take self@ema:.99, "
            "which is one"
        )
