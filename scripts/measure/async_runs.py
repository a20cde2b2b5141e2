"""Real runs of train_mopd.py on responses with a long tail, synchronous and asynchronous, and what
they leave behind.

Same student, teacher, prompts, seeds and number of updates on every side; sides take turns (A B C A
B C):

* ``sync``: one process writes, scores and trains in turns;
* ``split``: a rollout server writes, and each step waits for it (`--max_staleness 0`);
* ``async``: the same server writes ahead (`--max_staleness` steps).

One server serves all runs of ``split`` and ``async``. The teacher is on the trainer's device
everywhere. Each process has one thread, so ``sync`` uses one core and the others two, as two
devices would be used.

Lengths are long-tailed because the models' weights say so (`give_a_long_tail`): the chance of the
EOS token is one of two, and which one is decided as the response is written.
"""

import json
import os
import secrets
import statistics
import string
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch

from opd.clients.protocols import TOKEN_VARIABLE
from opd.clients.wire import metric
from opd.servers.server_processes import serving
from scripts.measure import tools
from scripts.measure.runs import (
    byte_tokenizer,
    environment,
    flags,
    run_child,
    silent_model,
    steps_of,
    write_prompts,
)

SIDES = ("sync", "split", "async")
PHASES = ("rollout", "score", "train", "sync")
WARMUP_STEPS = 4  # left out: first calls of everything, and servers that were not ahead yet
MICRO_BATCH_SIZE = 8
IMPOSSIBLE = -20.0  # a logit next to others of about 0
# updates of the usual cost that change no response, so that all sides train on the same ones
LEARNING_RATE = "1e-8"
POLL_S = 0.2


@dataclass(frozen=True)
class Setting:
    """What all sides have in common."""

    steps: int = 22
    prompts: int = 16  # of a step, one response each
    prompt_tokens: int = 16
    max_response_tokens: int = 480
    # Chances per token. A response begins in the short mode, where it ends or goes over to the long
    # mode; there it only ends.
    ends_short: float = 1 / 32
    lengthens: float = 1 / 256
    ends_long: float = 1 / 160
    student: tuple[int, int] = (4, 256)  # layers, hidden size
    teacher: tuple[int, int] = (4, 256)
    max_staleness: int = 2
    threads: int = 1  # of each process
    seed: int = 0

    @property
    def window(self) -> slice:
        """The steps that are measured: those before which, and in which, a server that may write
        ahead does so.
        """
        return slice(WARMUP_STEPS, self.steps - self.max_staleness)


@dataclass(frozen=True)
class Measured:
    """One run. Arrays are over its steps, all of them; I steps, B responses."""

    # from the end of the step before to the end of this one, logging included
    seconds_I: np.ndarray
    phases: dict[str, np.ndarray]  # name -> [I]
    pause_I: np.ndarray  # of the server in a push; 0 without one
    waited_I: np.ndarray  # in which nothing was trained because responses were being written
    lag_I: np.ndarray  # mean age of the weights that wrote a response
    lengths_IB: np.ndarray
    rollout_idle: float | None  # share of the window in which the server had nothing to write


# ---- The workload --------------------------------------------------------------------------------


@torch.no_grad()
def give_a_long_tail(model, tokenizer, setting: Setting) -> None:
    """Makes a random model write lower-case letters, and then perhaps upper-case ones, for about as
    long as asked.

    Two channels of the embeddings carry the mode: 1 everywhere, and 1 in upper-case letters. The
    head reads the logits of the mode from them and next to nothing else, so that lengths stay what
    they are while the model trains.
    """
    # In a vocabulary of one token a byte, letters are themselves, and decoded text shows how many
    # tokens it had.
    lower, upper = (
        tokenizer.convert_tokens_to_ids(list(letters))
        for letters in (string.ascii_lowercase, string.ascii_uppercase)
    )
    embeddings_VH = model.model.embed_tokens.weight
    embeddings_VH[:, :2] = torch.tensor([1.0, 0.0])
    embeddings_VH[upper, 1] = 1.0
    ids_BS = torch.tensor([8 * lower, 8 * upper])  # a row in each mode
    # what the head sees of them
    modes_MC = model.model(input_ids=ids_BS).last_hidden_state[:, :, :2].mean(dim=1)
    logits_VM = torch.full((len(embeddings_VH), 2), IMPOSSIBLE)
    stays = 1 - setting.ends_short - setting.lengthens
    logits_VM[lower, 0], logits_VM[upper, 1] = 0.0, 0.0
    logits_VM[upper, 0] = float(np.log(setting.lengthens / stays))
    logits_VM[tokenizer.eos_token_id] = torch.tensor(
        np.log([26 * setting.ends_short / stays, 26 * setting.ends_long / (1 - setting.ends_long)]),
        dtype=torch.float32,
    )
    model.lm_head.weight[tokenizer.eos_token_id] = (
        0.0  # one random row would shift all lengths; letters' rows even out
    )
    model.lm_head.weight[:, :2] = torch.linalg.solve(modes_MC, logits_VM.T).T


def write_long_tailed(root: Path, setting: Setting) -> None:
    """`student`, `teacher` and `prompts.jsonl`."""
    tokenizer = byte_tokenizer(512)
    for seed, name in enumerate(("student", "teacher")):
        model = silent_model(*getattr(setting, name), tokenizer, seed)
        give_a_long_tail(model, tokenizer, setting)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    count = setting.steps * setting.prompts
    write_prompts(root / "prompts.jsonl", count, setting.prompt_tokens, seed=setting.seed)


# ---- The runs ------------------------------------------------------------------------------------


def command(root: Path, run_dir: Path, side: str, setting: Setting, url: str) -> list[str]:
    """The run of a side."""
    arguments = flags(
        student_model=root / "student",
        teacher=f"teacher={root / 'teacher'}",
        data=root / "prompts.jsonl",
        output_dir=run_dir,
        num_steps=setting.steps,
        seed=setting.seed,
        prompts_per_step=setting.prompts,
        micro_batch_size=min(MICRO_BATCH_SIZE, setting.prompts),
        max_prompt_tokens=setting.prompt_tokens,
        max_response_tokens=setting.max_response_tokens,
        dtype="float32",
        ds_config="ds_configs/zero0.json",
        learning_rate=LEARNING_RATE,
        enforce_eager=True,
        rollout_kv_cache_gib=0.25,
        teacher_kv_cache_gib=0.05,
        parity_every=0,
        rollout_every=1,
        rollout_samples=setting.prompts,
    )
    if side != "sync":
        arguments += flags(
            mode="async",
            max_staleness=setting.max_staleness if side == "async" else 0,
            rollout_servers=url,
            weights_dir=root / "weights",
        )
    return [sys.executable, "train_mopd.py", *arguments]


@contextmanager
def polled(url: str, name: str) -> Iterator[list[tuple[float, float]]]:
    """(time, value) of a figure of a server's metrics page, again and again while the
    block runs.
    """
    points, over = [], threading.Event()
    headers = {"Authorization": f"Bearer {os.environ[TOKEN_VARIABLE]}"}

    def poll() -> None:
        with httpx.Client(headers=headers, trust_env=False, timeout=5.0) as client:
            while not over.wait(POLL_S):
                try:
                    points.append(
                        (time.time(), metric(client.get(f"{url}/metrics").content, name=name))
                    )
                except httpx.HTTPError:  # it is busy; a poll that is missing says nothing
                    continue

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield points
    finally:
        over.set()
        thread.join(timeout=30)


def run_all(setting: Setting, rounds: int) -> dict[str, list[Measured]]:
    """Side -> its runs, one for each round."""
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
    os.environ.update(environment(setting.threads))  # for the server; a run is given the same
    with tempfile.TemporaryDirectory(prefix="bench_async_") as directory, ExitStack() as stack:
        root = Path(directory)
        write_long_tailed(root, setting)
        (root / "weights").mkdir(mode=0o700)
        longest = str(setting.prompt_tokens + setting.max_response_tokens)
        (server,) = stack.enter_context(
            serving(
                str(root / "student"),
                name="rollout",
                protocol="rollout",
                weights_dir=root / "weights",
                dtype="float32",
                kv_cache_gib=0.25,
                extra=["--max_model_len", longest, "--enforce_eager"],
                start_seconds=300.0,
            )
        )
        for turn in range(rounds):
            for side in SIDES:
                run_dir = root / f"{side}_{turn}"
                with polled(server.url, "opd_running") as running:
                    arguments = command(root, run_dir, side, setting, server.url)
                    run_child(arguments, root / "log.txt", environment(setting.threads))
                runs[side].append(read_run(run_dir, setting, running if side != "sync" else []))
                tools.say(f"{side}: {figures(runs[side][-1:], setting)}")
    return runs


# ---- What they leave behind ----------------------------------------------------------------------


def read_run(run_dir: Path, setting: Setting, running: list[tuple[float, float]]) -> Measured:
    """The steps of a run that has ended; `running` are times and numbers of responses that its
    server was writing.
    """
    rows = steps_of(run_dir)
    files = [run_dir / "rollouts" / f"step_{row['step']}.jsonl" for row in rows]
    assert len(rows) == setting.steps, (len(rows), setting.steps)
    ends = [path.stat().st_mtime for path in files]  # written at the end of each step
    window = setting.window
    first, last = ends[window.start - 1], ends[window.stop - 1]
    polls = [count for when, count in running if first < when <= last]

    def column(key: str) -> np.ndarray:
        return np.array([row.get(key, 0.0) for row in rows])

    return Measured(
        seconds_I=np.diff(ends, prepend=ends[0] - rows[0]["time/step"]),
        phases={phase: column(f"time/{phase}") for phase in PHASES},
        pause_I=column("rollout/push_pause_s"),
        waited_I=column("perf/trainer_idle") * column("time/step")
        if running
        else column("time/rollout"),
        lag_I=column("staleness/policy_lag"),
        lengths_IB=np.array(
            [[response_tokens(line) for line in path.read_text().splitlines()] for path in files]
        ),
        rollout_idle=statistics.mean(count == 0 for count in polls) if polls else None,
    )


def response_tokens(line: str) -> int:
    """Tokens of a response in `rollouts/step_N.jsonl`: a letter is one, and so is the EOS token."""
    row = json.loads(line)
    return len(row["response"].removesuffix("<eos>")) + (row["finish_reason"] == "stop")


def figures(runs: list[Measured], setting: Setting) -> dict[str, float | None]:
    """Means over the measured steps, of which the median over runs.

    Means, because with strict order a long wait is followed by short ones, which a median over
    steps would take for the rule.
    """
    window = setting.window

    def median(of) -> float:
        return round(statistics.median(float(of(run)) for run in runs), 4)

    idle = [run.rollout_idle for run in runs if run.rollout_idle is not None]
    return {
        "step_s": median(lambda run: run.seconds_I[window].mean()),
        "step_median_s": median(lambda run: np.median(run.seconds_I[window])),
        **{
            f"{phase}_s": median(lambda run, phase=phase: run.phases[phase][window].mean())
            for phase in PHASES
        },
        "trainer_idle": median(
            lambda run: run.waited_I[window].sum() / run.seconds_I[window].sum()
        ),
        "rollout_idle": round(statistics.median(idle), 4) if idle else None,
        "staleness": median(lambda run: run.lag_I[window].mean()),
    }


def length_figures(lengths_IB: np.ndarray, maximum: int) -> dict[str, float]:
    """What the tail is."""
    median, p95, p99 = np.percentile(lengths_IB, (50, 95, 99))
    return {
        "median": float(median),
        "mean": round(float(lengths_IB.mean()), 1),
        "p95": float(p95),
        "p99": float(p99),
        "max": int(lengths_IB.max()),
        "at_maximum": round(float((lengths_IB == maximum).mean()), 4),
        "longest_of_step_over_mean": round(
            float((lengths_IB.max(axis=1) / lengths_IB.mean(axis=1)).mean()), 1
        ),
    }
