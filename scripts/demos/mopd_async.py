"""The demo of scripts/quickstart.sh, asynchronously, while processes of it are killed.

A rollout server writes the responses of coming steps while the trainer trains, a log-prob server
computes what the old policy makes of them, and one of the two teachers is served. In the middle of
the run one process of each role is killed in turn and started again; the trainer continues from its
last checkpoint. Exit status 1 if a sample was lost, trained on twice or staler than one version. No
GPU needed. Flags that are not its own go to train_mopd.py.

    python scripts/demos/mopd_async.py
    python scripts/demos/mopd_async.py --kill_at --num_steps 100   # nobody is killed
"""

import argparse
import collections
import os
import random
import secrets
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from opd.clients.protocols import TOKEN_VARIABLE
from opd.records import sample_ledger
from opd.records.report import report_command
from scripts.chaos import ROLES, Servers, play, problems_of, serving_roles
from scripts.measure.runs import flags, steps_of
from scripts.measure.tools import ROOT, say

RUN, SERVERS = Path("runs/async"), Path("runs/async_servers")
WEIGHTS = SERVERS / "weights"
KILL_AT = ((60, "teacher"), (120, "logprob"), (180, "rollout"), (240, "trainer"))
DEADLINE_S = 3 * 3600.0  # of the whole run
MAX_STALENESS = 1


@dataclass
class Schedule:
    """Kills a role after a step that is written down."""

    kills: list[tuple[int, str]]  # step, role
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    done: collections.Counter = field(default_factory=collections.Counter)

    def victim(self, step: int) -> str | None:
        """The next role, when its step is trained."""
        if not self.kills or step < self.kills[0][0]:
            return None
        role = self.kills.pop(0)[1]
        say(f"--- step {step}: killing {role}, and starting it again")
        return role


def roles_of(rollout_servers: int) -> dict[str, tuple[str, dict]]:
    """One teacher's server, one for log-probabilities, and those that write."""
    pushed = {"weights_dir": WEIGHTS}
    extra = ["--max_model_len", "28", "--enforce_eager"]
    rollout = {"replicas": rollout_servers, "kv_cache_gib": 0.1, "extra": extra}
    return {
        "teacher": ("demo/teacher_addition", {"protocol": "binary", "kv_cache_gib": 0.05}),
        "logprob": ("demo/student", {"protocol": "logprob", **pushed}),
        "rollout": ("demo/student", {"protocol": "rollout", **rollout, **pushed}),
    }


def write_config(path: Path, servers: Servers) -> None:
    """The demo's configuration, one of its teachers served, and the addresses of the servers."""
    urls = {role: [server.url for server in own] for role, own in servers.items()}
    config = yaml.safe_load((ROOT / "scripts" / "quickstart.yaml").read_text())
    for entry in config["teachers"]:
        if entry["name"] == "addition":
            served = {"backend": "server", "urls": urls["teacher"], "api_key_env": TOKEN_VARIABLE}
            entry.update(served)
    config |= {
        "mode": "async",
        "max_staleness": MAX_STALENESS,
        "rollout_servers": urls["rollout"],
        "logprob_servers": urls["logprob"],
        "weights_dir": str(WEIGHTS),
        # a server that was killed takes a while to come back, on two cores that are busy
        "rollout_wait_s": 300.0,
        "teacher_wait_s": 300.0,
        "old_logprobs": "server",
        "is_mode": "truncate",
        "save_every": 25,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def summary(killed: int) -> tuple[str, list[str]]:
    """What became of the run in one line, and what is not as it must be."""
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    size = {"steps": config["num_steps"], "prompts": config["prompts_per_step"]}
    problems = problems_of(RUN, **size, max_staleness=MAX_STALENESS)
    samples = sample_ledger.read(RUN / sample_ledger.FILE)
    lag = max(row["step"] - 1 - row["policy_version"] for row in samples)
    idle = statistics.median(row["perf/trainer_idle"] for row in steps_of(RUN))
    text = (
        f"{killed} processes killed; {len(samples)} samples, {len(problems)} problems; staleness "
        f"at most {lag}; the trainer was idle for {idle:.0%} of a step (median)"
    )
    return text, problems


def strike(text: str) -> tuple[int, str]:
    """`60:teacher` as (60, "teacher")."""
    step, _, role = text.partition(":")
    if not step.isdigit() or role not in ROLES:
        raise argparse.ArgumentTypeError(f"{text}: give STEP:ROLE, a role of {', '.join(ROLES)}")
    return int(step), role


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--kill_at",
        type=strike,
        nargs="*",
        default=list(KILL_AT),
        metavar="STEP:ROLE",
        help="who is killed after which step (default: each role once); none: nobody",
    )
    parser.add_argument("--servers", type=int, default=1, help="that write responses")
    args, rest = parser.parse_known_args()
    os.chdir(ROOT)
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose more to barriers
    for directory in (RUN, SERVERS):  # this run is about what happens in it: it starts afresh
        shutil.rmtree(directory, ignore_errors=True)
    WEIGHTS.mkdir(mode=0o700, parents=True)
    command = [sys.executable, "scripts/make_demo.py", "--output_dir", "demo"]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    schedule = Schedule(list(args.kill_at))
    with serving_roles(roles_of(args.servers), SERVERS) as servers:
        write_config(SERVERS / "run.yaml", servers)
        command = [sys.executable, "train_mopd.py", *flags(config=SERVERS / "run.yaml")]
        command += [*flags(output_dir=RUN), *rest]
        say(f"training; the trainer's console is {RUN.with_suffix('.log')}")
        play(command, RUN, servers, schedule, deadline_s=DEADLINE_S)
    report_command([str(RUN)])
    text, problems = summary(schedule.done.total())
    for line in problems:
        say(line)
    print(text)
    return int(bool(problems or schedule.kills))


if __name__ == "__main__":
    sys.exit(main())
