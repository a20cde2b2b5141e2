"""Draws docs/step.svg: who is on the GPU in each phase of a step, as `opd/colocation.py` has it.

    python scripts/measure/draw_diagrams.py            # writes the picture
    python scripts/measure/draw_diagrams.py --check    # compares only; exit status 1 if it is stale

The phases and what is awake in them are read from `colocation.TABLE`, so the picture says what the
code does. Widths are not to scale. The other diagrams of the pages are Mermaid, inside the pages.
"""

import argparse
import sys
from pathlib import Path

from opd.colocation import TABLE

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "step.svg"

PHASES = {  # name -> (width, what happens in it)
    "rollout": (250, "the student writes"),
    "score": (210, "teachers read, in turn"),
    "train": (190, "the student learns"),
    "sync": (120, "new weights"),
}
TEACHERS = ("teacher: math", "teacher: code")
COLOURS = {"sampler": "#2f7ebc", "teacher": "#d9822b", "student": "#3d8b55"}
LEFT, TOP, ROW, BAR, GAP, RIGHT = 210, 62, 34, 22, 4, 14
NEXT = 46  # of the next step's rollout, at the right edge


def spans() -> dict[str, list[tuple[int, int]]]:
    """Row -> the (start, end) in which it is on the GPU, from the left edge of the time line."""
    rows: dict[str, list[tuple[int, int]]] = {
        "sampler: weights": [], "sampler: KV cache": [], **{name: [] for name in TEACHERS},
        "student: optimizer states": [], "student: parameters": [],
    }  # fmt: skip
    start = 0
    for name, (width, _) in [*PHASES.items(), ("rollout", (NEXT, ""))]:
        phase, whole = TABLE[name], (start, start + width)
        if "weights" in phase.rollout:
            rows["sampler: weights"].append(whole)
        if "kv_cache" in phase.rollout:
            rows["sampler: KV cache"].append(whole)
        if name == "score":  # one at a time
            turn = width // len(TEACHERS)
            for place, teacher in enumerate(TEACHERS):
                rows[teacher].append((start + place * turn, start + (place + 1) * turn))
        if phase.states:
            rows["student: optimizer states"].append(whole)
        rows["student: parameters"].append(whole)  # `--offload_student all` lets them leave, too
        start += width
    return {name: joined(parts) for name, parts in rows.items()}


def joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours that touch are one bar."""
    whole: list[tuple[int, int]] = []
    for start, end in parts:
        if whole and whole[-1][1] == start:
            start = whole.pop()[0]
        whole.append((start, end))
    return whole


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle", more: str = ""):
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}{more}>{words}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def columns(bottom: int) -> list[str]:
    """A shaded column for each phase, with its name and what happens in it."""
    lines, start = [], LEFT
    for place, (name, (width, caption)) in enumerate([*PHASES.items(), ("…", (NEXT, ""))]):
        middle, bold, grey = start + width / 2, ' font-weight="bold"', ' fill="#555555"'
        lines += [
            box(start, 8, width, bottom - 8, ("#f1f1f1", "#f9f9f9")[place % 2]),
            text(middle, 29, name, size=15, more=bold),
            text(middle, 48, caption, size=12, more=grey),
        ]
        start += width
    return lines


def picture() -> str:
    """The whole SVG."""
    rows = spans()
    width = LEFT + sum(width for width, _ in PHASES.values()) + NEXT + RIGHT
    bottom = TOP + ROW * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 34}" '
        'font-family="DejaVu Sans, Verdana, Arial, sans-serif" fill="#222222">',
        "<title>A step as a time line: who is on the GPU in which phase</title>",
        box(0, 0, width, bottom + 34, "#ffffff"),
        *columns(bottom),
    ]
    for place, (name, parts) in enumerate(rows.items()):
        middle, colour = TOP + ROW * place + ROW / 2, COLOURS[name.split(":")[0]]
        lines.append(text(LEFT - 12, middle + 5, name, anchor="end"))
        for start, end in parts:
            x, y = LEFT + start + GAP / 2, middle - BAR / 2
            lines.append(box(x, y, end - start - GAP, BAR, colour, ' rx="3"'))
    note = "A bar: on the GPU. No bar: in host memory, or dropped. Time is not to scale."
    lines += [
        text(LEFT, bottom + 22, note, size=12, anchor="start", more=' fill="#555555"'),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    help_text = "compare only; exit status 1 if the picture is stale"
    parser.add_argument("--check", action="store_true", help=help_text)
    args = parser.parse_args()
    assert list(PHASES) == list(TABLE), "the phases of the picture are not those of the table"
    name = PICTURE.relative_to(ROOT)
    if not args.check:
        PICTURE.write_text(picture(), encoding="utf-8")
        print(f"wrote {name}")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture():
        print(f"{name} is stale: run python scripts/measure/draw_diagrams.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
