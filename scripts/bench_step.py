"""A whole training step of train_mopd.py against a step of TRL's DistillationTrainer, on the same
work.

Both sides start from the same random student and teacher (Qwen3, float32), sample one response of
exactly the same length to the same prompts, and take one AdamW step on the same loss, the reverse
KL over the full vocabulary (TRL: ``beta=1``). No model can write the EOS token (`silence`), so no
side is spared a token; the measured lengths are checked. Workloads:

* ``tiny``: 8 prompts, 32 + 64 tokens, student of 2 layers x 128, teacher of 4 x 256;
* ``small``: 32 prompts, 32 + 128 tokens, student of 8 layers x 256, teacher of 8 x 512.

Modes: ``1rank`` is one plain process; ``zero3_2ranks`` is DeepSpeed ZeRO-3 on two ranks, which
share the prompts. TRL runs twice, with Hugging Face's generation and with vLLM in the process, and
the faster one is what we compare with. Each side is a child process with the same number of
threads; sides take turns (A B C A B C), the first four steps of each run are dropped, and times are
medians over the steps of all its runs.

A step is what the user waits for: generation, teacher, forward, backward, optimizer, new weights in
the sampler. Logging is outside on both sides. A ratio is theirs / ours: above 1 this project is
faster.

    pip install --no-deps --target .trl trl==1.16.0
    python scripts/bench_step.py --json
"""

import argparse
import json
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.engines.vllm_process import ENVIRONMENT as VLLM_ENVIRONMENT
from opd.processes import free_port
from scripts.measure.tools import ROOT, last_error

BIN = Path(sys.executable).parent
WARMUP_STEPS = 4
HEAD_DIM = 32  # the smallest that vLLM's attention takes on the CPU
LEARNING_RATE, SEED = 1e-3, 0
DEADLINE_S = 900  # of one run
OUR_PHASES = ("rollout", "score", "train", "sync")
INSTALL_TRL = "pip install --no-deps --target {} trl==1.16.0"


@dataclass(frozen=True)
class Workload:
    prompts: int  # per step, over all ranks
    prompt_tokens: int
    response_tokens: int
    student: tuple[int, int]  # layers, hidden size
    teacher: tuple[int, int]


@dataclass(frozen=True)
class Mode:
    ranks: int
    ds_config: str


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
}
MODES = {
    "1rank": Mode(1, "ds_configs/zero0.json"),
    "zero3_2ranks": Mode(2, "ds_configs/zero3.json"),
}


class RunFailed(Exception):
    """A child process did not measure anything; the message is the reason."""


# ---- Models and prompts --------------------------------------------------------------------------


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per byte, EOS, padding, and fillers up to `vocab_size` that text never needs."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<unused_{i}>" for i in range(vocab_size - len(tokens) - 2)] + ["<eos>", "<pad>"]
    assert len(tokens) == vocab_size, f"{len(tokens)} tokens for a vocabulary of {vocab_size}"
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n' if add_generation_prompt else '' }}"  # noqa: E501
    return tokenizer


@torch.no_grad()
def silence(model: Qwen3ForCausalLM, token_ids: list[int]) -> None:
    """Makes `token_ids` as good as impossible, for any sampler, and leaves them so while the model
    trains.

    The head has no bias, so one channel is made into one: every embedding has 1 there, the other
    tokens read 0 from it and these read -20. The channel stays positive through the residual
    stream, since the layers add little to it.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[token_ids, 0] = -20.0


def make_model(
    layers: int, hidden_size: int, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // HEAD_DIM,
            num_key_value_heads=hidden_size // HEAD_DIM,
            head_dim=HEAD_DIM,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            dtype="float32",
            bos_token_id=None,
            **special,
        )
    )
    silence(model, list(special.values()))
    model.generation_config = GenerationConfig(**special)
    return model


def write_workload(root: Path, workload: Workload, *, steps: int, vocab_size: int) -> None:
    """`student`, `teacher` and `prompts.jsonl`, as many prompts as all steps need, each of exactly
    the asked length.
    """
    tokenizer = make_tokenizer(vocab_size)
    for seed, name in enumerate(("student", "teacher")):
        make_model(*getattr(workload, name), tokenizer, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = random.Random(SEED)
    rows = []
    for _ in range(steps * workload.prompts):
        text = "".join(rng.choices(string.ascii_lowercase, k=workload.prompt_tokens - 1))
        rows.append({"data_source": "teacher", "prompt": [{"role": "user", "content": text}]})
    ids = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert len(ids) == workload.prompt_tokens, (len(ids), workload.prompt_tokens)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- One run of one side -------------------------------------------------------------------------


def environment(threads: int, **more: str) -> dict[str, str]:
    """The same for both sides: threads, vLLM's placement of them, no network, and no rank of
    whoever started us.
    """
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launch}
    on_cpu = (
        {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    )
    return {
        **kept,
        **VLLM_ENVIRONMENT,
        **on_cpu,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        **more,
    }


def run_child(
    command: list[str], log: Path, env: dict[str, str], deadline_s: int = DEADLINE_S
) -> None:
    """Runs to the end, in a process group of its own; RunFailed with the last error it printed."""
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"no end after {deadline_s} s") from None
        finally:
            if child.poll() is None:  # nothing that we started outlives us
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(60)
    if status:
        text = log.read_text(errors="replace")
        sys.stderr.write(text[-3000:])
        raise RunFailed(f"exit status {status}: {last_error(text)}")


def launched(script: str, mode: Mode, *, launcher: str) -> list[str]:
    if mode.ranks == 1:
        return [sys.executable, script]
    if launcher == "deepspeed":
        return [
            str(BIN / "deepspeed"),
            "--num_gpus",
            str(mode.ranks),
            "--master_port",
            str(free_port()),
            script,
        ]
    return [
        str(BIN / "torchrun"),
        "--nproc-per-node",
        str(mode.ranks),
        "--master-port",
        str(free_port()),
        script,
    ]


def run_ours(case: Case, work: Path) -> dict:
    """Seconds per step and phase, lengths and losses, from a run's metrics.jsonl."""
    w = case.workload
    command = [
        *launched("train_mopd.py", case.mode, launcher="deepspeed"),
        *(
            "--student_model",
            str(case.root / "student"),
            "--teacher",
            f"teacher={case.root / 'teacher'}",
        ),
        *("--data", str(case.root / "prompts.jsonl"), "--output_dir", str(work / "run")),
        *(
            "--loss",
            "reverse_kl",
            "--support",
            "full",
            "--dtype",
            "float32",
            "--ds_config",
            case.mode.ds_config,
        ),
        *("--num_steps", str(case.steps), "--prompts_per_step", str(w.prompts)),
        *("--micro_batch_size", str(w.prompts // case.mode.ranks)),
        *(
            "--max_prompt_tokens",
            str(w.prompt_tokens),
            "--max_response_tokens",
            str(w.response_tokens),
        ),
        *("--learning_rate", str(LEARNING_RATE), "--lr_schedule", "constant", "--seed", str(SEED)),
        *("--rollout_kv_cache_gib", "0.25", "--teacher_kv_cache_gib", "0.05"),
        *(["--enforce_eager"] if case.enforce_eager else []),
        *("--parity_every", "0", "--rollout_every", "0"),  # extras that TRL does not have
    ]
    run_child(command, work / "log.txt", environment(case.threads))
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > 0]
    return {
        "seconds": {
            phase: [row[f"time/{phase}"] for row in rows] for phase in ("step", *OUR_PHASES)
        },
        "response_tokens": [row["rollout/response_tokens"] for row in rows],
        "losses": [row["loss/total"] for row in rows],
    }


def trl_ds_config(case: Case, work: Path) -> list[str]:
    """Our sharding, with the keys that the Trainer fills in."""
    if case.mode.ranks == 1:
        return []
    keys = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    ds_config = {
        **json.loads((ROOT / case.mode.ds_config).read_text()),
        **dict.fromkeys(keys, "auto"),
    }
    path = work / "ds_config.json"
    path.write_text(json.dumps(ds_config))
    return ["--ds_config", str(path)]


def run_trl(case: Case, work: Path, generation: str) -> dict:
    """The same of TRL, as scripts/measure/trl_step.py wrote it down.

    RunFailed if it did not shard as asked.
    """
    w = case.workload
    command = [
        *launched("scripts/measure/trl_step.py", case.mode, launcher="torchrun"),
        *("--student", str(case.root / "student"), "--teacher", str(case.root / "teacher")),
        *(
            "--data",
            str(case.root / "prompts.jsonl"),
            "--out",
            str(work / "result.json"),
            "--generation",
            generation,
        ),
        *(
            "--steps",
            str(case.steps),
            "--batch",
            str(w.prompts // case.mode.ranks),
            "--seed",
            str(SEED),
        ),
        *("--prompt_tokens", str(w.prompt_tokens), "--response_tokens", str(w.response_tokens)),
        *("--learning_rate", str(LEARNING_RATE), *trl_ds_config(case, work)),
    ]
    path = os.pathsep.join(
        filter(None, [str(case.trl_dir.resolve()), os.environ.get("PYTHONPATH")])
    )
    run_child(
        command,
        work / "log.txt",
        environment(case.threads, PYTHONPATH=path, VLLM_CPU_KVCACHE_SPACE="1"),
    )
    result = json.loads((work / "result.json").read_text())
    asked = json.loads((ROOT / case.mode.ds_config).read_text())["zero_optimization"]["stage"]
    if result["zero_stage"] != asked:
        raise RunFailed(f"ran with ZeRO stage {result['zero_stage']}, {asked} asked")
    return result


SIDES = {
    "ours": run_ours,
    "trl_hf": lambda case, work: run_trl(case, work, "hf"),
    "trl_vllm": lambda case, work: run_trl(case, work, "vllm"),
}


# ---- The comparison ------------------------------------------------------------------------------


def kept_ms(values: list[float]) -> list[float]:
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
            print(f"  {side}, round {r + 1} of {rounds}", file=sys.stderr, flush=True)
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
            lines.append(f"  {side:9} {result[side]['step_ms']:9.1f} ms   {phases}")
        elif side in result["reasons"]:
            lines.append(f"  {side:9} did not run: {result['reasons'][side]}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
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
        print(json.dumps({**headline, **setting, **trl, "workloads": workloads}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as failure:  # on our side: there is nothing to compare
        sys.exit(f"error: {failure}")
