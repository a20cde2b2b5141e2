"""Kills processes of an asynchronous run at random moments, and looks whether each sample was
trained on exactly once.

Rounds of `train_mopd.py --mode async` with two rollout servers, two log-prob servers and two
servers of its teacher, on models of a few thousand parameters. While a round trains, one process
after another, of each role in turn, gets SIGKILL and is started again, a quarter of them before the
run has recovered from the one before. Rounds alternate between --max_staleness 2, where no sample
may be lost, trained on twice or staler than that, and 0, where samples and final weights must be
those of an undisturbed run, bit for bit. Exit status 1 if something is not as it must be.

    python scripts/chaos.py --kills 200 --json
"""

import argparse
import collections
import json
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import yaml

from opd import processes
from opd.clients.protocols import TOKEN_VARIABLE
from opd.inputs.content import content_hash
from opd.records import sample_ledger
from opd.servers.server_processes import ServerProcess, serving
from scripts.measure.runs import LEARNING_RATE, SEED, Workload, environment, flags, write_workload
from scripts.measure.tools import ROOT, last_error, print_json, say

WORK = Workload(prompts=4, prompt_tokens=8, response_tokens=24, student=(1, 64), teacher=(1, 64))
VOCAB = 300
POLL_S = 0.05
HASTE = 0.25  # of the kills come before the run has recovered
MOST_LAUNCHES = 200  # of one round: a trainer that always fails must not go on for ever
ROUND_S = 1800.0  # for one run
ROLES = ("trainer", "rollout", "logprob", "teacher")


Servers = dict[str, list[ServerProcess]]  # role -> its servers


@dataclass
class Fleet:
    """The servers of all rounds, which outlive their trainers."""

    servers: Servers
    root: Path
    weights: Path
    steps: int

    def command(self, run_dir: Path, max_staleness: int) -> list[str]:
        """A launch of the trainer; the same again resumes."""
        urls = {role: [server.url for server in servers] for role, servers in self.servers.items()}
        teacher = {
            "name": "teacher",
            "backend": "server",
            "urls": urls["teacher"],
            "api_key_env": TOKEN_VARIABLE,
            "domains": ["teacher"],
        }
        config = run_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump({"teachers": [teacher]}))
        arguments = flags(
            config=config,
            student_model=self.root / "student",
            data=self.root / "prompts.jsonl",
            output_dir=run_dir,
            num_steps=self.steps,
            prompts_per_step=WORK.prompts,
            max_prompt_tokens=WORK.prompt_tokens,
            max_response_tokens=WORK.response_tokens,
            learning_rate=LEARNING_RATE,
            dtype="float32",
            ds_config=ROOT / "ds_configs" / "zero0.json",
            loss="reverse_kl_pg",
            clip_low=0.2,
            is_mode="truncate",
            old_logprobs="server",
            save_every=1,
            parity_every=0,
            rollout_every=0,
            mode="async",
            max_staleness=max_staleness,
            weights_dir=self.weights,
            rollout_servers=urls["rollout"],
            logprob_servers=urls["logprob"],
        )
        return [sys.executable, str(ROOT / "train_mopd.py"), *arguments]


@contextmanager
def serving_roles(roles: dict[str, tuple[Path | str, dict]], logs: Path) -> Iterator[Servers]:
    """Role -> (model, options of its servers): the servers of each; at the end they are gone."""
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(
                serving(str(model), name=role, log_dir=logs / role, **options)
            )
            for role, (model, options) in roles.items()
        }


@contextmanager
def fleet_of(root: Path, steps: int) -> Iterator[Fleet]:
    """Models, prompts, and two servers of each role."""
    write_workload(root, WORK, steps=steps, vocab_size=VOCAB)
    weights = root / "weights"
    weights.mkdir(mode=0o700)
    common = {"replicas": 2, "dtype": "float32"}
    pushed = {**common, "weights_dir": weights}
    length = str(WORK.prompt_tokens + WORK.response_tokens)
    rollout = {"kv_cache_gib": 0.05, "extra": ["--max_model_len", length, "--enforce_eager"]}
    # One sequence at a time: what a server says does not depend on what else it is asked, to the
    # last bit.
    logprob = {"extra": ["--max_tokens_per_batch", "1"]}
    roles = {
        "rollout": (root / "student", {"protocol": "rollout", **rollout, **pushed}),
        "logprob": (root / "student", {"protocol": "logprob", **logprob, **pushed}),
        "teacher": (root / "teacher", {"protocol": "binary", "kv_cache_gib": 0.05, **common}),
    }
    with serving_roles(roles, root / "servers") as servers:
        yield Fleet(servers, root, weights, steps)


class Killer(Protocol):
    """Who is killed, and when."""

    rng: random.Random  # chooses among the servers of a role
    done: collections.Counter  # role -> kills

    def victim(self, step: int) -> str | None:
        """The role of who is to be killed now, `step` being the last one that is trained."""


@dataclass
class RandomKiller:
    """Whom it strikes, and when, is a function of the seed; how far they are by then is not."""

    kills: int
    gap_s: float  # mean time between a step and a kill
    roles: tuple[str, ...]
    rng: random.Random
    done: collections.Counter = field(default_factory=collections.Counter)
    # roles that are still to be struck before one is struck again
    turns: list[str] = field(default_factory=list)
    after_step: int | None = None  # which has to be trained before the next kill; None: none has to
    next_at: float | None = None  # s, of a monotonic clock

    @property
    def left(self) -> int:
        """Kills that are still to come."""
        return self.kills - self.done.total()

    def begin_run(self) -> None:
        """Nothing has been trained yet."""
        self.after_step = self.next_at = None

    def victim(self, step: int) -> str | None:
        """A kill comes some time after a step that was trained since the last one, or else a run
        would never end on a slow machine; now and then it comes without.
        """
        if self.after_step is not None and step <= self.after_step:
            return None
        if self.next_at is None:
            self.next_at = time.monotonic() + self.rng.uniform(0, 2) * self.gap_s
        if not self.left or time.monotonic() < self.next_at:
            return None
        self.next_at, self.after_step = None, None if self.rng.random() < HASTE else step
        if not self.turns:  # each role once, in a new order
            self.turns = self.rng.sample(self.roles, len(self.roles))
        return self.turns.pop()


def last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl has; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # without a torn last one
    return json.loads(lines[-1])["step"] if lines else 0


def play(
    command: list[str],
    run_dir: Path,
    servers: Servers,
    killer: Killer | None,
    deadline_s: float = ROUND_S,
) -> dict:
    """One run from its first step to its last, however often it takes to launch it."""
    started, launches, stops = time.monotonic(), 1, []
    log = run_dir.with_suffix(".log")

    def launch():
        return processes.spawn(command, log=log, env=environment(1))

    trainer = launch()
    while True:
        time.sleep(POLL_S)
        assert time.monotonic() - started < deadline_s and launches <= MOST_LAUNCHES, (
            f"{run_dir.name} does not end: {stops[-3:]}"
        )
        if trainer.poll() is not None:
            if trainer.returncode == 0:
                break
            stops.append(last_error(log.read_text(errors="replace")))
            say(f"the trainer stopped with status {trainer.returncode}: {stops[-1]}")
            trainer, launches = launch(), launches + 1
            continue
        role = killer.victim(last_step(run_dir)) if killer else None
        if role == "trainer":
            processes.end(trainer.pid, 0)
            trainer.wait(60)
            trainer, launches = launch(), launches + 1
        elif role:
            server = killer.rng.choice(servers[role])
            server.kill()
            server.restart()
        if role:
            killer.done[role] += 1
    return {"launches": launches, "stops": stops, "seconds": round(time.monotonic() - started, 1)}


def problems_of(
    run_dir: Path, steps: int, prompts: int, max_staleness: int, calm: Path | None = None
) -> list[str]:
    """What is not as it must be after a run of one response a prompt, a line each; `calm` is the
    undisturbed run whose samples and weights it must have.
    """
    rows = sample_ledger.read(run_dir / sample_ledger.FILE)
    expected = [f"{step}/{place}/0" for step in range(steps) for place in range(prompts)]
    counts = collections.Counter(row["id"] for row in rows)
    problems = [f"{name}: lost" for name in expected if not counts[name]]
    problems += [f"{name}: trained on {count} times" for name, count in counts.items() if count > 1]
    problems += [f"{name}: not expected" for name in counts.keys() - set(expected)]
    for row in rows:
        lag = row["step"] - 1 - row["policy_version"]
        if not 0 <= lag <= max_staleness or int(row["id"].split("/")[0]) != row["step"] - 1:
            problems.append(f"{row['id']}: trained on in step {row['step']}, {lag} versions behind")
    if calm is not None:
        problems += sample_ledger.differences(sample_ledger.read(calm / sample_ledger.FILE), rows)
        if content_hash(str(calm / "model")) != content_hash(str(run_dir / "model")):
            problems.append("the final weights are not those of the undisturbed run")
    return problems


def chaos(fleet: Fleet, args: argparse.Namespace) -> dict:
    """Rounds until the kills are used up."""
    killer = RandomKiller(args.kills, args.gap_s, tuple(args.roles), random.Random(args.seed))
    calm, rounds = fleet.root / "calm", []
    play(fleet.command(calm, 0), calm, fleet.servers, None)
    bounds = [2, 0]
    while killer.left:
        bound = bounds[len(rounds) % len(bounds)]
        run_dir = fleet.root / f"round_{len(rounds)}"
        before = killer.done.total()
        killer.begin_run()
        result = play(fleet.command(run_dir, bound), run_dir, fleet.servers, killer)
        undisturbed = calm if bound == 0 else None
        problems = problems_of(run_dir, fleet.steps, WORK.prompts, bound, undisturbed)
        rounds.append(
            {
                "max_staleness": bound,
                "kills": killer.done.total() - before,
                "problems": problems,
                **result,
            }
        )
        say(f"round {len(rounds)}: {json.dumps(rounds[-1])}")
    return {
        "kills": dict(killer.done),
        "rounds": len(rounds),
        "samples": len(rounds) * fleet.steps * WORK.prompts,
        "launches": sum(one["launches"] for one in rounds),
        "stops": [line for one in rounds for line in one["stops"]],
        "problems": [
            f"round {n}: {line}" for n, one in enumerate(rounds) for line in one["problems"]
        ],
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """A mistake ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--gap_s", type=float, default=1.5, help="mean time between a step and the kill after it"
    )
    parser.add_argument("--steps", type=int, default=30, help="of a round")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument(
        "--work_dir", type=Path, help="kept (default: a temporary directory that is removed)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args(argv)
    for flag in ("kills", "gap_s", "steps"):
        if not getattr(args, flag) > 0:
            parser.error(f"--{flag} {getattr(args, flag)}: must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args, started = parse_arguments(argv), time.monotonic()
    others = set(psutil.Process().children(recursive=True))
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ExitStack() as stack:
        root = args.work_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="opd_chaos_"))
        )
        root.mkdir(parents=True, exist_ok=True)
        with fleet_of(root, args.steps) as fleet:
            result = chaos(fleet, args)
    # who was here before is not ours
    left = set(psutil.Process().children(recursive=True)) - others
    result["left_alive"] = [
        " ".join(child.cmdline())[:200] for child in left if child.status() != psutil.STATUS_ZOMBIE
    ]
    result["seconds"] = round(time.monotonic() - started, 1)
    for line in result["problems"]:
        say(line)
    print(
        f"{sum(result['kills'].values())} kills, {result['samples']} samples, "
        f"{len(result['problems'])} problems"
    )
    if args.json:
        print_json(result)
    return int(bool(result["problems"] or result["left_alive"]))


if __name__ == "__main__":
    sys.exit(main())
