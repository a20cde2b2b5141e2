"""What the benchmarks that start trainers share: random models, prompts, and child processes.

Models are Qwen3 in float32 over a vocabulary of bytes, and no model can write the EOS token
(`silence`): every response has exactly the length that is asked.
"""

import os
import random
import signal
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd.engines.vllm_process import ENVIRONMENT as VLLM_ENVIRONMENT
from opd.processes import free_port
from scripts.make_demo import random_qwen3, write_jsonl
from scripts.measure.tools import ROOT, last_error, read_jsonl

BIN = Path(sys.executable).parent
LEARNING_RATE, SEED = 1e-3, 0
DEADLINE_S = 900  # of one run
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\n' if add_generation_prompt else '' "
    "}}"
)


@dataclass(frozen=True)
class Workload:
    """The size of a run's steps and of its models."""

    prompts: int  # per step, over all ranks
    prompt_tokens: int
    response_tokens: int
    student: tuple[int, int]  # layers, hidden size
    teacher: tuple[int, int]
    learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Mode:
    """How many ranks share a run, and how."""

    ranks: int
    ds_config: str


class RunFailed(Exception):
    """A child process did not measure anything; the message is the reason."""


# ---- Models and prompts --------------------------------------------------------------------------


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per byte, EOS, padding, and fillers up to `vocab_size` that text never needs."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<unused_{i}>" for i in range(vocab_size - len(tokens) - 2)] + ["<eos>", "<pad>"]
    assert len(tokens) == vocab_size, f"{len(tokens)} tokens for a vocabulary of {vocab_size}"
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


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


def silent_model(
    layers: int, hidden_size: int, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3ForCausalLM:
    """A random model that never ends a response."""
    torch.manual_seed(seed)
    model = random_qwen3(hidden_size, layers, tokenizer, mlp_ratio=2, positions=512)
    silence(model, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    return model


def write_prompts(
    path: Path, count: int, tokens: int, domains: tuple[str, ...] = ("teacher",), seed: int = SEED
) -> None:
    """`count` prompts of exactly `tokens` random letters, whose domains take turns."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        text = "".join(rng.choices(string.ascii_lowercase, k=tokens - 1))  # the template adds one
        chat = [{"role": "user", "content": text}]
        rows.append({"data_source": domains[i % len(domains)], "prompt": chat})
    write_jsonl(path, rows)


def write_workload(root: Path, workload: Workload, *, steps: int, vocab_size: int) -> None:
    """`student`, `teacher` and `prompts.jsonl`, as many prompts as all steps need."""
    tokenizer = byte_tokenizer(vocab_size)
    for seed, name in enumerate(("student", "teacher")):
        silent_model(*getattr(workload, name), tokenizer, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_prompts(root / "prompts.jsonl", steps * workload.prompts, workload.prompt_tokens)


# ---- Runs ----------------------------------------------------------------------------------------


def flags(**values) -> list[str]:
    """`--name value` for each: a list is several values, True a bare switch; None and False are
    left out.
    """
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def environment(threads: int, **more: str) -> dict[str, str]:
    """The same for all sides: threads, vLLM's placement of them, no network, and no rank of
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
    command: list[str], log: Path, env: dict[str, str], deadline_s: float = DEADLINE_S
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
            raise RunFailed(f"no end after {deadline_s:.0f} s") from None
        finally:
            if child.poll() is None:  # nothing that we started outlives us
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(60)
    if status:
        text = log.read_text(errors="replace")
        sys.stderr.write(text[-3000:])
        raise RunFailed(f"exit status {status}: {last_error(text)}")


def launched(script: str, mode: Mode, *, launcher: str) -> list[str]:
    """The command of a script under a launcher, `deepspeed` or `torchrun`; one rank needs none."""
    if mode.ranks == 1:
        return [sys.executable, script]
    if launcher == "deepspeed":
        of_launcher = flags(num_gpus=mode.ranks, master_port=free_port())
    else:
        of_launcher = flags(**{"nproc-per-node": mode.ranks, "master-port": free_port()})
    return [str(BIN / launcher), *of_launcher, script]


def steps_of(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are steps: an evaluation before training is none."""
    return [row for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"] > 0]
