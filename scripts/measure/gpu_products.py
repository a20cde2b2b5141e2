"""The sections of gpu_check.py that need torch alone: copies, and what the matrix products cost.

Shape suffixes: N tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.ops.fused_linear import score_hidden
from scripts import bench_loss
from scripts.measure import tools

GIB, GB = 2**30, 1e9
MATMUL_TOKENS = 4096


@dataclass(frozen=True)
class Size:
    """What the sections run on.

    Models are (hidden size, layers); the first teacher is the largest.
    """

    vocab: int
    student: tuple[int, int]
    teachers: tuple[tuple[int, int], ...]
    loss_hidden: tuple[int, ...]
    loss_tokens: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    kv_cache_gib: float
    copy_bytes: int


def measure_copies(size: Size, device: str) -> dict:
    """GB/s of one large copy, as weights are copied."""
    host = torch.empty(size.copy_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device, pin_memory=False)
    ms, _ = tools.take_turns(
        {
            "to_gpu": lambda: there.copy_(host, non_blocking=True),
            "to_host": lambda: host.copy_(there, non_blocking=True),
        },
        7,
        device,
    )
    rates = {
        f"{name}_gb_s": round(size.copy_bytes / GB / (value / 1e3), 2) for name, value in ms.items()
    }
    return {
        "headline": f"{rates['to_gpu_gb_s']} GB/s in, {rates['to_host_gb_s']} GB/s out",
        **rates,
    }


def measure_loss(size: Size, device: str) -> dict:
    """Reverse KL over the whole vocabulary, forward and backward: two projections and two
    gradients.
    """

    def sides(case: bench_loss.Case, inputs: bench_loss.Inputs, logits_NV: Tensor):
        return (
            lambda: bench_loss.loss_and_gradients(bench_loss.our_loss, inputs, case),
            lambda: bench_loss.bare_matmul(inputs, logits_NV),
        )

    return _against_products(size, device, sides, products=4)


def measure_scoring(size: Size, device: str, support_k: int = 64) -> dict:
    """Log-probability, entropy and top-k of every token from hidden states: one projection."""

    def sides(case: bench_loss.Case, inputs: bench_loss.Inputs, logits_NV: Tensor):
        hidden_NH, weight_VH = inputs.teacher_hidden_NG, inputs.teacher_weight_VG
        labels_N = torch.randint(case.vocab, (case.tokens,), device=device)
        return (
            lambda: score_hidden(hidden_NH, weight_VH, labels_N, support_k=support_k),
            lambda: tools.bare_projection(hidden_NH, weight_VH, logits_NV),
        )

    return {**_against_products(size, device, sides, products=1), "support_k": support_k}


def _against_products(size: Size, device: str, sides: Callable, *, products: int) -> dict:
    """A row for each hidden size: our time, that of the `products` alone, their rate, and the
    memory that ours takes beside its inputs. `sides` makes two calls: ours, and the products.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for hidden in size.loss_hidden:
        case = bench_loss.Case(
            "reverse_kl", size.vocab, hidden, size.loss_tokens, 0.5, dtype, device, None
        )
        logits_NV = torch.empty(
            min(case.tokens, MATMUL_TOKENS), case.vocab, dtype=dtype, device=device
        )
        ours, bare = sides(case, bench_loss.make_inputs(case), logits_NV)
        # kernels are compiled and chosen for the shape
        tools.take_turns({"ours": ours, "bare": bare}, 2, device)
        ms, _ = tools.take_turns({"ours": ours, "bare": bare}, 5, device)
        flops = 2 * products * case.tokens * hidden * case.vocab
        extra = tools.peak_extra_bytes(ours, device) if device == "cuda" else None
        rows.append(
            {
                "H": hidden,
                "V": case.vocab,
                "N": case.tokens,
                "ours_ms": round(ms["ours"], 3),
                "matmul_ms": round(ms["bare"], 3),
                "share_of_matmul_ceiling": tools.ratio(ms["bare"], ms["ours"]),
                "tflop_s": round(flops / (ms["ours"] / 1e3) / 1e12, 2),
                "extra_gib": None if extra is None else round(extra / GIB, 3),
            }
        )
    shares = ", ".join(f"{row['share_of_matmul_ceiling']:.0%} (H {row['H']})" for row in rows)
    return {"headline": f"of the matmul ceiling: {shares}", "rows": rows}
