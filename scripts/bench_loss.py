"""Time, memory and error of the output projection and its divergence, forward and backward, against
the peers.

Every side gets the same hidden states and weights and returns the loss sum and its gradients with
respect to the student's hidden states and weight:

* `naive`: full logits of student and teacher, two log-softmaxes, autograd. What anybody would write
  in torch.
* `ours`: `opd.ops.fused_linear.fused_linear_divergence`.
* `trl`: the loss of TRL's DistillationTrainer, which tiles the vocabulary and projects again in the
  backward. It is read
  from its own directory, so that it cannot change this project's packages:

      pip install --no-deps --target .trl trl==1.16.0

* `liger`: Liger's fused linear JSD, on CUDA, if it is installed.
* `matmul`: the four bare matrix products that no exact form can avoid. Not a peer but the ceiling.

The sides must agree before they are timed. Time is the median over rounds in which they take turns.
Memory is the peak beyond inputs and returned gradients, measured: on CUDA by PyTorch's allocator,
on the CPU by resident memory, each side in a fresh process. The error is relative to float64 on a
few tokens: the larger of the loss's and the hidden gradient's (largest difference over largest
entry; the rows come from the full run, so that every chunk is looked at).

    python scripts/bench_loss.py           # V = 151,936: an hour on two cores
    python scripts/bench_loss.py --vocab 4096 --hidden 64 --tokens 512  # seconds
    python scripts/bench_loss.py --json    # the last line is one JSON object

Ratios are ours over theirs: below 1 is better.

Shape suffixes: N tokens, C the tokens checked in float64, H and G the hidden sizes of student and
teacher, V vocabulary.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opd.ops.fused_linear import fused_linear_divergence
from scripts.measure import tools

TRL_VERSION = "1.16.0"
KINDS = ("forward_kl", "reverse_kl", "jsd")
LOGIT_STD = 3.0  # the softmax is neither flat nor a single token
CHECKED_TOKENS = 16
MATMUL_TOKENS = {"cpu": 512, "cuda": 4096}  # at a time: enough to be as fast as it gets
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # naive logits of 10 are rounded to .03
MAX_ERROR_OF_PEERS = {**MAX_ERROR, torch.float32: 1e-3}  # the naive JSD is 1.5e-4 off at H = 2,048


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    kind: str
    vocab: int
    hidden: int
    tokens: int
    jsd_beta: float
    dtype: torch.dtype
    device: str
    chunk_bytes: int | None


@dataclass(frozen=True)
class Inputs:
    """What every side gets; the student's two tensors ask for gradients."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_hidden_NG: Tensor
    teacher_weight_VG: Tensor

    def rows(self, rows_C: Tensor) -> "Inputs":
        """The same weights, fewer tokens."""
        hidden_CH = self.hidden_NH.detach()[rows_C].requires_grad_(True)
        return replace(self, hidden_NH=hidden_CH, teacher_hidden_NG=self.teacher_hidden_NG[rows_C])


Loss = Callable[[Inputs, Case], Tensor]


def make_inputs(case: Case) -> Inputs:
    """Random, the same for every process: hidden states of unit scale, weights that give logits of
    LOGIT_STD.
    """
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        options = {"device": case.device, "dtype": case.dtype, "generator": generator}
        return torch.randn(rows, case.hidden, **options).mul_(scale)

    weight_scale = LOGIT_STD / math.sqrt(case.hidden)
    return Inputs(
        hidden_NH=normal(case.tokens, 1.0).requires_grad_(True),
        weight_VH=normal(case.vocab, weight_scale).requires_grad_(True),
        teacher_hidden_NG=normal(case.tokens, 1.0),
        teacher_weight_VG=normal(case.vocab, weight_scale),
    )


# ---- The sides -----------------------------------------------------------------------------------


def plain_divergence(student_logits_NV: Tensor, teacher_logits_NV: Tensor, case: Case) -> Tensor:
    """The sum over tokens as one would write it down, in the precision of the logits but never
    below float32.
    """
    precision = torch.promote_types(student_logits_NV.dtype, torch.float32)
    s_NV = F.log_softmax(student_logits_NV, dim=-1, dtype=precision)
    t_NV = F.log_softmax(teacher_logits_NV, dim=-1, dtype=precision)
    if case.kind == "forward_kl":
        return (t_NV.exp() * (t_NV - s_NV)).sum()
    if case.kind == "reverse_kl":
        return (s_NV.exp() * (s_NV - t_NV)).sum()
    beta = case.jsd_beta
    m_NV = torch.logaddexp(s_NV + math.log(1 - beta), t_NV + math.log(beta))
    return (
        beta * (t_NV.exp() * (t_NV - m_NV)).sum() + (1 - beta) * (s_NV.exp() * (s_NV - m_NV)).sum()
    )


def naive_loss(inputs: Inputs, case: Case) -> Tensor:
    """Full logits of both models."""
    with torch.no_grad():
        teacher_logits_NV = F.linear(inputs.teacher_hidden_NG, inputs.teacher_weight_VG)
    return plain_divergence(F.linear(inputs.hidden_NH, inputs.weight_VH), teacher_logits_NV, case)


def our_loss(inputs: Inputs, case: Case) -> Tensor:
    """This project's."""
    budget = {} if case.chunk_bytes is None else {"chunk_bytes": case.chunk_bytes}
    loss_sum, _ = fused_linear_divergence(
        inputs.hidden_NH,
        inputs.weight_VH,
        inputs.teacher_hidden_NG,
        inputs.teacher_weight_VG,
        kind=case.kind,
        jsd_beta=case.jsd_beta,
        **budget,
    )
    return loss_sum


def peer_beta(case: Case) -> float:
    """TRL and Liger overload beta: 0 is the forward KL, 1 the reverse; between, it weights the
    teacher as ours does.
    """
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": case.jsd_beta}[case.kind]


def trl_loss(inputs: Inputs, case: Case) -> Tensor:
    """TRL's; its directory must be on the path."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_N, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden_NH,
        inputs.weight_VH,
        None,
        inputs.teacher_hidden_NG,
        inputs.teacher_weight_VG,
        None,
        peer_beta(case),
    )
    return divergence_N.sum()


def liger_loss(inputs: Inputs, case: Case) -> Tensor:
    """Liger's, a mean over tokens made a sum."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=peer_beta(case))
    arguments = (
        inputs.hidden_NH,
        inputs.weight_VH,
        inputs.teacher_hidden_NG,
        inputs.teacher_weight_VG,
        None,
    )
    return loss(*arguments) * len(inputs.hidden_NH)


LOSSES: dict[str, Loss] = {
    "naive": naive_loss,
    "ours": our_loss,
    "trl": trl_loss,
    "liger": liger_loss,
}


def loss_and_gradients(loss: Loss, inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the hidden states); the weight's gradient is made and, once complete, let
    go.
    """
    loss_sum = loss(inputs, case)
    grad_hidden_NH, _ = torch.autograd.grad(loss_sum, (inputs.hidden_NH, inputs.weight_VH))
    return loss_sum.detach(), grad_hidden_NH


@torch.no_grad()
def bare_matmul(inputs: Inputs, logits_NV: Tensor) -> None:
    """Two projections and two gradients, as many tokens at a time as `logits_NV` has rows."""
    weight_gradient_VH = torch.zeros_like(inputs.weight_VH)  # inside, because every side makes one
    for hidden_NH, teacher_hidden_NG in zip(
        inputs.hidden_NH.split(len(logits_NV)),
        inputs.teacher_hidden_NG.split(len(logits_NV)),
        strict=True,
    ):
        chunk_NV = logits_NV[: len(hidden_NH)]
        torch.mm(teacher_hidden_NG, inputs.teacher_weight_VG.t(), out=chunk_NV)
        torch.mm(hidden_NH, inputs.weight_VH.t(), out=chunk_NV)
        torch.mm(chunk_NV, inputs.weight_VH)
        weight_gradient_VH.addmm_(chunk_NV.t(), hidden_NH)


def available_sides(trl_dir: Path, device: str) -> list[str]:
    """Names of the sides that can run here; says which cannot, and why."""
    sides = ["naive", "ours"]
    if (trl_dir / "trl" / "kernels" / "chunked_divergence.py").exists():
        sides.append("trl")
    else:
        tools.say(
            f"TRL is not in {trl_dir}: pip install --no-deps --target {trl_dir} trl=={TRL_VERSION}"
        )
    if device == "cuda":
        if find_spec("liger_kernel"):
            sides.append("liger")
        else:
            tools.say("Liger is not installed: pip install liger-kernel")
    return sides


# ---- Error ---------------------------------------------------------------------------------------


@torch.no_grad()
def float64_reference(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """(loss [], gradient of the hidden states) in float64; weights are widened a slice of the
    vocabulary at a time.
    """

    def logits(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        return torch.cat(
            [hidden_CH.double() @ part.double().t() for part in weight_VH.split(8192)], dim=-1
        )

    logits_CV = logits(inputs.hidden_NH, inputs.weight_VH).requires_grad_(True)
    with torch.enable_grad():
        loss = plain_divergence(
            logits_CV, logits(inputs.teacher_hidden_NG, inputs.teacher_weight_VG), case
        )
        (dlogits_CV,) = torch.autograd.grad(loss, logits_CV)
    parts = zip(dlogits_CV.split(8192, dim=-1), inputs.weight_VH.split(8192), strict=True)
    return loss.detach(), sum(dlogits @ weight.double() for dlogits, weight in parts)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def check_agreement(
    names: list[str], inputs: Inputs, case: Case, reference: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Error of each side on the checked tokens alone; ends the program if one computes something
    else.
    """
    errors = {}
    for name in names:
        loss, grad_CH = loss_and_gradients(LOSSES[name], inputs, case)
        errors[name] = max(
            relative_error(loss, reference[0]), relative_error(grad_CH, reference[1])
        )
        if not errors[name] <= (MAX_ERROR if name == "ours" else MAX_ERROR_OF_PEERS)[case.dtype]:
            sys.exit(
                f"{name} disagrees with float64 by {errors[name]:.2g} on {case}: nothing was timed"
            )
    return errors


# ---- Measuring -----------------------------------------------------------------------------------


def warm_up(name: str, case: Case) -> None:
    """Loads libraries and starts threads: a first call pays for things that later ones do not."""
    small = replace(case, tokens=32, vocab=min(case.vocab, 512))
    loss_and_gradients(LOSSES[name], make_inputs(small), small)


def peak_mib(name: str, case: Case, trl_dir: str) -> float:
    """Peak beyond inputs and returned gradients, which have the student's shapes and dtype.

    For a process of its own.
    """
    sys.path.append(trl_dir)
    warm_up(name, case)
    inputs = make_inputs(case)
    returned = sum(
        tensor.numel() * tensor.element_size() for tensor in (inputs.hidden_NH, inputs.weight_VH)
    )
    peak = tools.peak_extra_bytes(
        lambda: loss_and_gradients(LOSSES[name], inputs, case), case.device
    )
    return max(0.0, (peak - returned) / tools.MIB)


def measure(case: Case, sides: list[str], repeats: int, trl_dir: str) -> dict:
    """One row of the result."""
    in_place = tools.in_child if case.device == "cpu" else lambda function, *args: function(*args)
    tools.say(f"{case.kind}, V = {case.vocab}, H = {case.hidden}, N = {case.tokens}")
    mib = {}
    for name in sides:
        mib[name] = in_place(peak_mib, name, case, trl_dir)
        told = "more memory than is free, skipped" if mib[name] is None else f"{mib[name]:.0f} MiB"
        tools.say(f"  {name}: {told}")
    sides = [name for name in sides if mib[name] is not None]

    inputs = make_inputs(case)
    rows_C = torch.linspace(
        0, case.tokens - 1, min(CHECKED_TOKENS, case.tokens), device=case.device
    ).long()
    some = inputs.rows(rows_C)
    reference = float64_reference(some, case)
    errors = check_agreement(sides, some, case, reference)

    logits_NV = torch.empty(
        min(case.tokens, MATMUL_TOKENS[case.device]),
        case.vocab,
        device=case.device,
        dtype=case.dtype,
    )
    runs = {
        name: lambda name=name: loss_and_gradients(LOSSES[name], inputs, case) for name in sides
    }
    runs["matmul"] = lambda: bare_matmul(inputs, logits_NV)
    if case.device == "cuda":
        tools.take_turns(runs, 2, case.device)  # kernels are compiled and tuned for the real shape
    ms, results = tools.take_turns(runs, repeats, case.device)
    if "ours" in sides:
        errors["ours"] = max(
            errors["ours"], relative_error(results["ours"][1][rows_C], reference[1])
        )
    return row(case, ms, mib, errors)


def row(
    case: Case, ms: dict[str, float], mib: dict[str, float | None], errors: dict[str, float]
) -> dict:
    """Ratios first, then what they were made of.

    A peak below 1 MiB is below what the meter can tell.
    """
    measurable = {name: value for name, value in mib.items() if value is not None and value >= 1.0}
    result = {
        "kind": case.kind,
        "V": case.vocab,
        "H": case.hidden,
        "N": case.tokens,
        "time_vs_naive": tools.ratio(ms.get("ours"), ms.get("naive")),
        "time_vs_trl": tools.ratio(ms.get("ours"), ms.get("trl")),
        "memory_vs_naive": tools.ratio(measurable.get("ours"), measurable.get("naive")),
        "error": float(f"{errors['ours']:.3g}"),
        "error_of_naive": float(f"{errors['naive']:.3g}") if "naive" in errors else None,
        "share_of_matmul_ceiling": tools.ratio(ms["matmul"], ms.get("ours")),
    }
    if case.device == "cuda":
        result["time_vs_liger"] = tools.ratio(ms.get("ours"), ms.get("liger"))
        result["memory_vs_liger"] = tools.ratio(measurable.get("ours"), measurable.get("liger"))
    names = ("naive", "ours", "trl", *(["liger"] if case.device == "cuda" else []))
    result |= {
        f"{name}_ms": round(ms[name], 4) if name in ms else None for name in (*names, "matmul")
    }
    result |= {
        f"{name}_mib": None if mib.get(name) is None else round(mib[name], 1) for name in names
    }
    return result


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tools.make_parser(__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jsd_beta", type=float, default=0.5)
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds in which each side runs once"
    )
    parser.add_argument(
        "--chunk_bytes", type=int, help="memory budget of our side (default: the library's)"
    )
    parser.add_argument(
        "--trl_dir", type=Path, default=Path(".trl"), help="directory that TRL was installed into"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on the CPU",
    )
    return parser


def main() -> int:
    args = make_parser().parse_args()
    device = tools.pick_device(args.device)
    dtype_name = (
        args.dtype if args.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    )
    common = (args.jsd_beta, getattr(torch, dtype_name), device, args.chunk_bytes)
    sides = available_sides(args.trl_dir, device)
    trl_dir = str(args.trl_dir.resolve())
    sys.path.append(trl_dir)
    for name in sides:
        warm_up(name, Case("jsd", args.vocab, args.hidden[0], 32, *common))
    cases = []
    for hidden, tokens, kind in itertools.product(args.hidden, args.tokens, args.kinds):
        cases.append(
            measure(Case(kind, args.vocab, hidden, tokens, *common), sides, args.repeats, trl_dir)
        )
        tools.say(
            "  "
            + ", ".join(f"{key} {value}" for key, value in cases[-1].items() if key.endswith("_ms"))
        )
    if args.json:
        tools.print_json(
            {
                "cases": cases,
                "dtype": dtype_name,
                "repeats": args.repeats,
                **tools.machine_facts(device),
            }
        )
    else:
        print(tools.table(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
