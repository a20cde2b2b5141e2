"""How the cost of the loss grows: with tokens, with the vocabulary, with the support and with the
number of teachers.

* Tokens and vocabulary: `opd.ops.fused_linear.fused_linear_divergence` with both gradients should
  be linear in either, a
  slope of 1 in a log-log plot. A little less where fixed costs still show, more where something
  outgrows its memory.
* Support: `opd.ops.fused_linear.score_hidden` projects to the whole vocabulary whatever the top-k,
  so k should cost next to
  nothing, a slope near 0. Measured on the largest vocabulary.
* Teachers: the tokens of a step are shared out among the teachers, each with an output projection
  of its own, and the
  student's gradient is summed. Every token is scored once, so the cost should not depend on how
  many teachers there are: `teachers_4_vs_1` near 1.

All points of a panel are measured once per round, in turns, and the median over rounds is reported.

    python scripts/bench_scaling.py --plot docs/scaling.png   # a minute on two cores
    python scripts/bench_scaling.py --json                    # the last line is one JSON object

Shape suffixes: N tokens, H hidden size, V vocabulary.
"""

import argparse
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from opd.ops.fused_linear import fused_linear_divergence, score_hidden
from scripts.measure import tools

LOGIT_STD = 3.0
KIND = "reverse_kl"
Run = Callable[[], object]


def random_head(hidden: int, vocab: int, seed: int, device: str) -> Tensor:
    """An output projection [V, H] that makes logits of LOGIT_STD from hidden states of
    unit scale.
    """
    return random_hidden(vocab, hidden, seed, device) * (LOGIT_STD / math.sqrt(hidden))


def random_hidden(tokens: int, hidden: int, seed: int, device: str) -> Tensor:
    """Hidden states [N, H] of unit scale."""
    return torch.randn(
        tokens, hidden, generator=torch.Generator(device).manual_seed(seed), device=device
    )


def loss_run(tokens: int, vocab: int, num_teachers: int, hidden: int, device: str) -> Run:
    """A call that computes the loss over `tokens` tokens, shared out among teachers, and both
    student gradients.
    """
    hidden_NH = random_hidden(tokens, hidden, 0, device).requires_grad_(True)
    weight_VH = random_head(hidden, vocab, 1, device).requires_grad_(True)
    heads = [random_head(hidden, vocab, 2 + i, device) for i in range(num_teachers)]
    rows = [
        slice(i * tokens // num_teachers, (i + 1) * tokens // num_teachers)
        for i in range(num_teachers)
    ]
    teacher_hidden_NH = random_hidden(tokens, hidden, 99, device)

    def run() -> None:
        hidden_NH.grad = weight_VH.grad = None
        for own_N, head_VH in zip(rows, heads, strict=True):
            loss_sum, _ = fused_linear_divergence(
                hidden_NH[own_N], weight_VH, teacher_hidden_NH[own_N], head_VH, kind=KIND
            )
            loss_sum.backward()

    return run


def score_run(tokens: int, vocab: int, support_k: int, hidden: int, device: str) -> Run:
    """A call that scores `tokens` tokens with a top-k."""
    hidden_NH = random_hidden(tokens, hidden, 0, device)
    weight_VH = random_head(hidden, vocab, 1, device)
    labels_N = torch.arange(tokens, device=device) % vocab
    return lambda: score_hidden(hidden_NH, weight_VH, labels_N, support_k=support_k)


def panels(args: argparse.Namespace, device: str) -> dict[str, dict[int, Callable[[], Run]]]:
    """What to measure: panel -> x -> how to build the call (built when its panel is measured, then
    dropped).
    """
    sizes = {"hidden": args.hidden, "device": device}
    most, vocab = max(args.tokens), args.vocab
    middle = sorted(args.tokens)[len(args.tokens) // 2]
    return {
        "tokens": {x: lambda x=x: loss_run(x, vocab, 1, **sizes) for x in args.tokens},
        "vocabulary": {x: lambda x=x: loss_run(middle, x, 1, **sizes) for x in args.vocabularies},
        "support": {
            x: lambda x=x: score_run(middle, max(args.vocabularies), x, **sizes)
            for x in args.supports
        },
        "teachers": {x: lambda x=x: loss_run(most, vocab, x, **sizes) for x in args.teachers},
    }


def measure(args: argparse.Namespace, device: str) -> dict[str, list[dict]]:
    """Panel -> points `{"x", "ms"}`, in the order of x."""
    points = {}
    for panel, builders in panels(args, device).items():
        runs = {str(x): builders[x]() for x in sorted(builders)}
        tools.take_turns(runs, 1, device)  # first calls start threads and compile kernels
        ms, _ = tools.take_turns(runs, args.repeats, device)
        points[panel] = [{"x": int(x), "ms": round(value, 3)} for x, value in ms.items()]
        tools.say(
            f"{panel}: "
            + ", ".join(f"{point['x']} {point['ms']:.1f} ms" for point in points[panel])
        )
    return points


def fits(points: dict[str, list[dict]]) -> dict[str, float | None]:
    """Slopes in the log-log plane, and four teachers over one."""

    def slope_of(panel: str) -> float:
        return round(
            tools.slope(*zip(*[(point["x"], point["ms"]) for point in points[panel]], strict=True)),
            4,
        )

    teachers_ms = {point["x"]: point["ms"] for point in points["teachers"]}
    return {
        "slope_tokens": slope_of("tokens"),
        "slope_vocabulary": slope_of("vocabulary"),
        "slope_support": slope_of("support"),
        "teachers_4_vs_1": tools.ratio(teachers_ms.get(4), teachers_ms.get(1)),
    }


# ---- The plot ------------------------------------------------------------------------------------


def save_plot(path: Path, points: dict[str, list[dict]], fitted: dict, caption: str) -> None:
    """Four panels.

    What should be linear has log axes of equal spans and a line of slope 1, the rest begins at
    zero.
    """
    titles = {
        "tokens": f"loss, slope {fitted['slope_tokens']:.2f}",
        "vocabulary": f"loss, slope {fitted['slope_vocabulary']:.2f}",
        "support": f"scoring, slope {fitted['slope_support']:.2f}",
        "teachers": f"loss, 4 over 1: {fitted['teachers_4_vs_1'] or math.nan:.2f}",
    }
    labels = {"support": "support size", "teachers": "number of teachers"}
    with tools.picture(path, 4, (14, 3.6)) as (figure, axes):
        for axis, (panel, title) in zip(axes, titles.items(), strict=True):
            x, ms = zip(*[(point["x"], point["ms"]) for point in points[panel]], strict=True)
            axis.plot(x, ms, "o-", color="tab:blue", label="measured")
            axis.set(title=title, xlabel=labels.get(panel, panel), ylabel="ms")
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if panel in ("tokens", "vocabulary"):
                axis.set_yscale("log", base=2)
                axis.plot(
                    x,
                    [ms[-1] * value / x[-1] for value in x],
                    "--",
                    color="tab:gray",
                    label="linear",
                )
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.legend()
            else:
                axis.set_ylim(0, 1.25 * max(ms))
        figure.suptitle(caption, fontsize=9)


def main() -> int:
    parser = tools.make_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="write a PNG here, for example docs/scaling.png")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument(
        "--vocab", type=int, default=16_384, help="vocabulary of the panels tokens and teachers"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536]
    )
    parser.add_argument("--supports", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds in which each point is measured once"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    for name in ("tokens", "vocabularies", "supports"):
        if len(set(getattr(args, name))) < 2:
            parser.error(f"--{name} {getattr(args, name)}: a slope needs two different values")
    if args.plot and not find_spec("matplotlib"):
        parser.error(f"--plot {args.plot}: matplotlib is not installed: pip install matplotlib")

    device = tools.pick_device(args.device)
    points = measure(args, device)
    fitted = fits(points)
    facts = tools.machine_facts(device)
    if args.plot:
        where = (
            facts["device"] if device == "cuda" else f"{facts['cpu']}, threads: {facts['threads']}"
        )
        vocab = f"{args.vocab:,} (scoring: {max(args.vocabularies):,})"
        save_plot(
            args.plot, points, fitted, f"{where}; hidden size {args.hidden}; vocabulary {vocab}"
        )
    if args.json:
        tools.print_json(
            {**fitted, "points": points, "vocab": args.vocab, "hidden": args.hidden, **facts}
        )
    else:
        print(
            tools.table(
                [{"panel": panel, **point} for panel, row in points.items() for point in row]
            )
        )
        print(tools.table([fitted]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
