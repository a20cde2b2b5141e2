"""A whole training step of train_mopd.py against a step of TRL's DistillationTrainer, on the same
work.

Both sides start from the same random student and teacher (Qwen3, float32), sample one response of
exactly the same length to the same prompts, and take one AdamW step on the same loss, the reverse
KL over the full vocabulary (TRL: ``beta=1``). No model can write the EOS token (`silence`), so no
side is spared a token; the measured lengths are checked. Workloads:

* ``tiny``: 8 prompts, 32 + 64 tokens, student of 2 layers x 128, teacher of 4 x 256;
* ``small``: 32 prompts, 32 + 128 tokens, student of 8 layers x 256, teacher of 8 x 512;
* ``smollm2``: a real model, SmolLM2-135M-Instruct, teaches 20 of its 30 layers, on 16 prompts that
  people wrote, each with 96 tokens of response.

Modes: ``1rank`` is one plain process; ``zero3_2ranks`` is DeepSpeed ZeRO-3 on two ranks, which
share the prompts. TRL runs twice, with Hugging Face's generation and with vLLM in the process, and
the faster one is what we compare with. Each side is a child process with the same number of
threads; sides take turns (A B C A B C), the first four steps of each run are dropped, and times are
medians over the steps of all its runs. `peak_mib` is the most that a side's processes hold
together, memory that they share counted for each.

A step is what the user waits for: generation, teacher, forward, backward, optimizer, new weights in
the sampler. Logging is outside on both sides. A ratio is theirs / ours: above 1 this project is
faster.

    pip install --no-deps --target .trl trl==1.16.0
    python scripts/bench_step.py --json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.bench_colocation import peak_of_children
from scripts.measure.real_workload import write_smollm2
from scripts.measure.runs import (
    SEED,
    Mode,
    RunFailed,
    Workload,
    environment,
    flags,
    launched,
    run_child,
    steps_of,
    write_workload,
)
from scripts.measure.tools import MIB, ROOT, print_json, say

WARMUP_STEPS = 4
OUR_PHASES = ("rollout", "score", "train", "sync")
INSTALL_TRL = "pip install --no-deps --target {} trl==1.16.0"


@dataclass(frozen=True)
class Case:
    """One workload on disk, in one mode."""

    root: Path  # holds student, teacher and prompts.jsonl
    workload: Workload
    mode: Mode
    steps: int
    threads: int  # per rank
    trl_dir: Path
    enforce_eager: bool = False  # of our sampler


WORKLOADS = {
    "tiny": Workload(8, 32, 64, student=(2, 128), teacher=(4, 256)),
    "small": Workload(32, 32, 128, student=(8, 256), teacher=(8, 512)),
    "smollm2": Workload(16, 160, 96, student=(20, 576), teacher=(30, 576), learning_rate=1e-5),
}
MODES = {
    "1rank": Mode(1, "ds_configs/zero0.json"),
    "zero3_2ranks": Mode(2, "ds_configs/zero3.json"),
}


# ---- One run of one side -------------------------------------------------------------------------


def run_ours(case: Case, work: Path) -> dict:
    """Seconds per step and phase, lengths and losses, from a run's metrics.jsonl."""
    w = case.workload
    command = launched("train_mopd.py", case.mode, launcher="deepspeed") + flags(
        student_model=case.root / "student",
        teacher=f"teacher={case.root / 'teacher'}",
        data=case.root / "prompts.jsonl",
        output_dir=work / "run",
        loss="reverse_kl",
        support="full",
        dtype="float32",
        ds_config=case.mode.ds_config,
        num_steps=case.steps,
        prompts_per_step=w.prompts,
        micro_batch_size=w.prompts // case.mode.ranks,
        max_prompt_tokens=w.prompt_tokens,
        max_response_tokens=w.response_tokens,
        learning_rate=w.learning_rate,
        lr_schedule="constant",
        seed=SEED,
        rollout_kv_cache_gib=0.25,
        teacher_kv_cache_gib=0.05,
        enforce_eager=case.enforce_eager,
        parity_every=0,  # extras that TRL does not have
        rollout_every=0,
    )
    with peak_of_children() as peak:
        run_child(command, work / "log.txt", environment(case.threads))
    rows = steps_of(work / "run")
    phases = ("step", *OUR_PHASES)
    return {
        "peak_mib": peak.bytes // MIB,
        "seconds": {phase: [row[f"time/{phase}"] for row in rows] for phase in phases},
        "response_tokens": [row["rollout/response_tokens"] for row in rows],
        "losses": [row["loss/total"] for row in rows],
    }


def trl_ds_config(case: Case, work: Path) -> Path | None:
    """Our sharding, with the keys that the Trainer fills in."""
    if case.mode.ranks == 1:
        return None
    ds_config = json.loads((ROOT / case.mode.ds_config).read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        ds_config[key] = "auto"
    path = work / "ds_config.json"
    path.write_text(json.dumps(ds_config))
    return path


def run_trl(case: Case, work: Path, generation: str) -> dict:
    """The same of TRL, as scripts/measure/trl_step.py wrote it down.

    RunFailed if it did not shard as asked.
    """
    w = case.workload
    command = launched("scripts/measure/trl_step.py", case.mode, launcher="torchrun") + flags(
        student=case.root / "student",
        teacher=case.root / "teacher",
        data=case.root / "prompts.jsonl",
        out=work / "result.json",
        generation=generation,
        steps=case.steps,
        batch=w.prompts // case.mode.ranks,
        seed=SEED,
        prompt_tokens=w.prompt_tokens,
        response_tokens=w.response_tokens,
        learning_rate=w.learning_rate,
        ds_config=trl_ds_config(case, work),
    )
    trl_dir = str(case.trl_dir.resolve())
    path = os.pathsep.join(filter(None, [trl_dir, os.environ.get("PYTHONPATH")]))
    env = environment(case.threads, PYTHONPATH=path, VLLM_CPU_KVCACHE_SPACE="1")
    with peak_of_children() as peak:
        run_child(command, work / "log.txt", env)
    result = json.loads((work / "result.json").read_text())
    asked = json.loads((ROOT / case.mode.ds_config).read_text())["zero_optimization"]["stage"]
    if result["zero_stage"] != asked:
        raise RunFailed(f"ran with ZeRO stage {result['zero_stage']}, {asked} asked")
    return {**result, "peak_mib": peak.bytes // MIB}


SIDES = {
    "ours": run_ours,
    "trl_hf": lambda case, work: run_trl(case, work, "hf"),
    "trl_vllm": lambda case, work: run_trl(case, work, "vllm"),
}


# ---- The comparison ------------------------------------------------------------------------------


def kept_ms(values: list[float]) -> list[float]:
    """Milliseconds of the steps that count."""
    return [1000 * value for value in values[WARMUP_STEPS:]]


def summary(runs: list[dict], response_tokens: int) -> dict:
    """Medians over the steps of all runs, in milliseconds; RunFailed if a response had another
    length than asked.
    """
    lengths = {length for run in runs for length in run["response_tokens"]}
    if lengths != {response_tokens}:
        raise RunFailed(
            f"responses of {min(lengths):.2f} to {max(lengths):.2f} tokens, {response_tokens} asked"
        )
    phases = {
        name: round(
            statistics.median([ms for run in runs for ms in kept_ms(run["seconds"][name])]), 1
        )
        for name in runs[0]["seconds"]
    }
    return {
        "step_ms": phases.pop("step"),
        "step_ms_of_each_run": [
            round(statistics.median(kept_ms(run["seconds"]["step"])), 1) for run in runs
        ],
        "phases_ms": phases,
        "response_tokens": response_tokens,
        "peak_mib": max(run["peak_mib"] for run in runs),
        "first_loss": round(runs[0]["losses"][0], 5),
    }


def compare(case: Case, sides: list[str], rounds: int, work: Path) -> dict:
    """All sides in turn, `rounds` times.

    A TRL side that fails is null, with the reason; ours must not fail.
    """
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    reasons: dict[str, str] = {}
    for r in range(rounds):
        for side in sides:
            if side in reasons:
                continue
            directory = work / f"{side}_{r}"
            directory.mkdir(parents=True)
            say(f"  {side}, round {r + 1} of {rounds}")
            try:
                runs[side].append(SIDES[side](case, directory))
                summary(runs[side], case.workload.response_tokens)
            except RunFailed as error:
                if side == "ours":
                    raise
                reasons[side] = str(error)
    measured = {
        side: None if side in reasons else summary(runs[side], case.workload.response_tokens)
        for side in sides
    }
    peers = {
        side: result["step_ms"] for side, result in measured.items() if side != "ours" and result
    }
    fastest = min(peers, key=peers.__getitem__) if peers else None
    ours_ms = measured["ours"]["step_ms"]
    return {
        "speedup": round(peers[fastest] / ours_ms, 2) if fastest else None,
        "against": fastest,
        "speedup_against_each": {side: round(ms / ours_ms, 2) for side, ms in peers.items()},
        "threads_per_rank": case.threads,
        **measured,
        "reasons": reasons,
    }


def table(name: str, mode: str, result: dict) -> str:
    """A line for each side, under a line with the ratio."""
    ratio = (
        "no ratio"
        if result["speedup"] is None
        else f"{result['speedup']:.2f}x against {result['against']}"
    )
    lines = [f"{name}, {mode}, {result['threads_per_rank']} threads per rank: {ratio}"]
    for side in SIDES:
        if result.get(side):
            phases = "  ".join(
                f"{phase} {ms:.1f}" for phase, ms in result[side]["phases_ms"].items()
            )
            peak = f"{result[side]['peak_mib']:,} MiB"
            lines.append(f"  {side:9} {result[side]['step_ms']:9.1f} ms   {phases}   {peak}")
        elif side in result["reasons"]:
            lines.append(f"  {side:9} did not run: {result['reasons'][side]}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """A mistake ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    default = ["tiny", "small"]  # smollm2 is downloaded
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=default)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--steps", type=int, default=12, help=f"of each run; the first {WARMUP_STEPS} are dropped"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument(
        "--trl_dir", type=Path, default=ROOT / ".trl", help="where TRL was installed with --target"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=512, help="of student and teacher; at least 258"
    )
    parser.add_argument(
        "--enforce_eager", action="store_true", help="do not compile our sampler: a quick look"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="of all ranks together, the same for both sides"
    )
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps {args.steps}: the first {WARMUP_STEPS} are dropped; give more")
    if args.vocab_size < 258:
        parser.error(
            f"--vocab_size {args.vocab_size}: 256 bytes, EOS and padding need at least 258"
        )
    return args


def main() -> int:
    args = parse()
    has_trl = (args.trl_dir / "trl").is_dir()
    install = INSTALL_TRL.format(args.trl_dir)
    if not has_trl:
        print(
            f"TRL is not in {args.trl_dir}: only our side runs and the ratios are null; {install}",
            flush=True,
        )
    sides = list(SIDES) if has_trl else ["ours"]
    workloads: dict[str, dict] = {name: {} for name in args.workloads}
    with tempfile.TemporaryDirectory(prefix="bench_step_") as temporary:
        for name in args.workloads:
            root, workload = Path(temporary) / name, WORKLOADS[name]
            if name == "smollm2":
                write_smollm2(root, workload, steps=args.steps)
            else:
                write_workload(root, workload, steps=args.steps, vocab_size=args.vocab_size)
            for mode_name in args.modes:
                mode = MODES[mode_name]
                threads = max(1, args.threads // mode.ranks)
                case = Case(
                    root, workload, mode, args.steps, threads, args.trl_dir, args.enforce_eager
                )
                result = compare(case, sides, args.rounds, root / mode_name)
                workloads[name] |= {f"speedup_{mode_name}": result["speedup"], mode_name: result}
                print(table(name, mode_name, result), flush=True)
    headline = {
        f"speedup_{mode}": workloads.get("tiny", {}).get(f"speedup_{mode}") for mode in MODES
    }
    if args.json:
        setting = {key: getattr(args, key) for key in ("steps", "rounds", "threads", "vocab_size")}
        versions = [path.name for path in args.trl_dir.glob("trl-*.dist-info")]
        trl = {"trl": versions[0][4:-10] if versions else None, "install_trl": install}
        print_json({**headline, **setting, **trl, "workloads": workloads})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as failure:  # on our side: there is nothing to compare
        sys.exit(f"error: {failure}")
