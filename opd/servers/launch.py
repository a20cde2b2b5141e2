"""`scripts/serve.sh ROLE MODEL`: servers on this machine, and the YAML lines that name them to a
trainer.

ROLE is teacher, rollout or logprob. Starts `--replicas` servers on loopback ports,
`--tensor_parallel` GPUs each, waits until every one has answered a question, prints the lines on
stdout and stays until SIGINT or SIGTERM. With `--restart` a server that dies is started again.
Flags behind `--` go to the servers as they are. The exit status is 0 after a signal, 2 for a
mistake, 1 if a server does not come up or all have died.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from opd.clients.protocols import TOKEN_VARIABLE
from opd.distributed import resolve_dtype
from opd.inputs.arguments import OneLineParser
from opd.inputs.hub import fetch, find_snapshot
from opd.inputs.shapes import check_path, read_model, shape_of
from opd.log import one_line
from opd.ops.model_class import sees_images
from opd.servers.cache_size import CACHE_HELP, cache_and_length, cache_gib
from opd.servers.http_service import read_token
from opd.servers.server_processes import (
    LOOK_AGAIN_SECONDS,
    START_SECONDS,
    ServerProcess,
    StartError,
    serving,
)
from opd.weights.store import claim

JSON_TOKENS = 1 << 17  # of all questions that vLLM's own server reads at once
# what YAML reads as the text that it is; with true and null below
PLAIN_SCALAR = re.compile(r"[A-Za-z/~][\w./~+-]*")
YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "~"}


# What is served: its script and what `--help` says of it.
ROLES = {
    "teacher": "a teacher's servers on this machine, and the YAML entry that names them to a "
    "trainer",
    "rollout": "servers that sample for train_mopd.py --mode async, under the weights that it "
    "pushes",
    "logprob": "servers that compute the student's log-probabilities for train_mopd.py, under the "
    "weights that it pushes",
}
NO_TOKEN = (
    f"{TOKEN_VARIABLE} is not set: without a token nobody may push weights; make one for servers "
    f"and trainer: export {TOKEN_VARIABLE}=$(openssl rand -hex 16)"
)


def launch_arguments(argv: list[str]) -> argparse.Namespace:
    """A role and its flags. ValueError with one line for a mistake."""
    role, *argv = argv or [""]
    if role not in ROLES:
        raise ValueError(f"scripts/serve.sh {role}: expected {', '.join(ROLES)} first")
    end = argv.index("--") if "--" in argv else len(argv)
    own, extra = argv[:end], argv[end + 1 :]
    for word in argv:
        if word.partition("=")[0] in ("--host", "--port", "--uds"):
            raise ValueError(
                f"{word}: these servers listen on loopback ports that the kernel chooses; from "
                "another machine reach one through a tunnel: ssh -L PORT:127.0.0.1:PORT "
                "THIS_MACHINE"
            )
    args = _parser(role).parse_args(own)
    args.role, args.extra = role, extra
    _check_arguments(args)
    args.gpus = deal_gpus(args.gpus, args.replicas * getattr(args, "tensor_parallel", 1))
    if role == "teacher" and args.protocol == "json":
        _size_vllms_own(args)
    return args


def _parser(role: str) -> OneLineParser:
    """Only flags that do something for the role."""
    parser = OneLineParser(f"scripts/serve.sh {role}", ROLES[role])
    parser.add_argument(
        "model",
        help="directory or hub id" if role == "teacher" else "the trainer's --student_model",
    )
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", help="such as 0,1,2,3 (default: all that are visible)")
    dtypes = ["auto", "bfloat16", *(["float16"] if role != "logprob" else []), "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="auto")
    if role == "teacher":
        parser.add_argument("--protocol", choices=["binary", "json"], default="binary")
        parser.add_argument("--name", help="of the teacher (default: the last part of MODEL)")
        parser.add_argument(
            "--max_logprobs", type=int, default=1024, help="the largest --support_k of a trainer"
        )
    else:
        parser.add_argument(
            "--weights_dir",
            type=Path,
            required=True,
            help="where the trainer publishes its weights; made if it is missing, and must be "
            "this user's alone (0700)",
        )
    parser.add_argument(
        "--max_model_len", type=int, help="tokens of prompt and response (default: the model's)"
    )
    if role != "logprob":
        only = " (json only)" if role == "teacher" else ""
        parser.add_argument(
            "--tensor_parallel", type=int, default=1, help=f"GPUs of each replica{only}"
        )
        parser.add_argument("--kv_cache_gib", type=cache_gib, default="auto", help=CACHE_HELP)
    parser.add_argument(
        "--restart", action="store_true", help="start a server that died again, on the same port"
    )
    parser.add_argument(
        "--log_dir", type=Path, help="of the servers' logs (default: a temporary directory)"
    )
    parser.add_argument(
        "--start_timeout_s", type=float, default=START_SECONDS, help="for a replica to answer"
    )
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    """Fills in what follows from other flags.

    The directory of weights is made, so it comes last.
    """
    positive = ("replicas", "tensor_parallel", "max_logprobs", "max_model_len", "start_timeout_s")
    for flag in positive:
        value = getattr(args, flag, None)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag} {value}: must be above 0")
    check_path("MODEL", args.model)
    token = read_token()
    if args.role == "teacher":
        if args.protocol == "binary" and args.tensor_parallel > 1:
            raise ValueError(
                f"--tensor_parallel {args.tensor_parallel}: the binary protocol's engine has one "
                "GPU; use --protocol json"
            )
        args.name = args.name or Path(args.model).resolve().name
        if args.protocol == "binary" and args.max_model_len:
            args.extra = ["--max_model_len", str(args.max_model_len), *args.extra]
        return
    if token is None:
        raise ValueError(NO_TOKEN)
    args.protocol, args.name = args.role, Path(args.model).resolve().name
    args.extra = [
        *(["--max_model_len", str(args.max_model_len)] if args.max_model_len else []),
        *args.extra,
    ]
    # a link stays one: the store refuses it
    args.weights_dir = Path(os.path.abspath(args.weights_dir))
    try:
        claim(args.weights_dir)
    except ValueError as error:
        raise ValueError(f"--weights_dir {error}") from None


def _size_vllms_own(args: argparse.Namespace) -> None:
    """vLLM's own server is told how large its cache is, and how long sequences may be."""
    spelled = ("--max-model-len", "--max_model_len")
    asked = OneLineParser("", "")
    asked.add_argument(*spelled, type=int, default=args.max_model_len, dest="length")
    known, rest = asked.parse_known_args(args.extra)
    path = find_snapshot("MODEL", args.model)
    model = read_model("MODEL", path)
    shape = shape_of(model, "MODEL", path)
    args.kv_cache_gib, longest = cache_and_length(
        shape,
        known.length,
        args.kv_cache_gib,
        width=resolve_dtype(args.dtype).itemsize,
        gpus=args.tensor_parallel,
        tokens=JSON_TOKENS,
        device=_number_of(args.gpus[0]) if args.gpus else 0,
    )
    # the route that takes images beside token ids is one of them
    more = ["--enable-scale-out"] if sees_images(model.config) else []
    args.extra = ["--max-model-len", str(longest), *more, *rest]


def _number_of(gpu: str) -> int:
    """The number that this process gives to a GPU of `--gpus`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible.index(gpu) if gpu in visible else int(gpu)


def deal_gpus(flag: str | None, needed: int) -> list[str]:
    """The first `needed` GPUs of `--gpus`, or of those that are visible; none on a machine without.

    ValueError for too few.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = [name.strip() for name in (flag or visible).split(",") if name.strip()]
    if flag is not None and not count:
        raise ValueError(f"--gpus {flag}: no GPU is visible here; leave it out to serve on the CPU")
    if len(set(gpus)) != len(gpus):
        raise ValueError(f"--gpus {flag}: a GPU stands there twice")
    if count and len(gpus) < needed:
        raise ValueError(
            f"--replicas times --tensor_parallel needs {needed} GPUs, and there are {len(gpus)}: "
            f"{gpus}"
        )
    return gpus[:needed] if count else []


def entry(args: argparse.Namespace, urls: Sequence[str]) -> str:
    """What a trainer's YAML file takes."""
    quoted = json.dumps(list(urls))
    if args.role == "teacher":
        key = f", api_key_env: {TOKEN_VARIABLE}" if os.environ.get(TOKEN_VARIABLE) else ""
        fields = (
            f"name: {_scalar(args.name)}, model: {_scalar(args.model)}, backend: server, urls: "
            f"{quoted}{key}"
        )
        return f"teachers:\n  - {{{fields}}}"
    lines = [f"{args.role}_servers: {quoted}"]
    if args.role == "rollout":  # once: a file for both kinds of server has one such line
        lines.append(f"weights_dir: {_scalar(str(args.weights_dir))}")
    return "\n".join(lines)


def _scalar(text: str) -> str:
    plain = PLAIN_SCALAR.fullmatch(text) and text.lower() not in YAML_WORDS
    return text if plain else json.dumps(text)


def tell(message: str) -> None:
    """To whoever started the servers; stdout is for the entry."""
    print(message, file=sys.stderr, flush=True)


def _leave(signum, frame) -> None:
    for same in (signal.SIGTERM, signal.SIGINT):
        signal.signal(same, signal.SIG_IGN)  # the end is on its way
    sys.exit(0)


def launch() -> int:
    """Exit status; a signal is a SystemExit that ends the servers on its way out."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave)
    try:
        args = launch_arguments(sys.argv[1:])
        path = fetch("MODEL", args.model)  # before the time of a start is counted
    except ValueError as error:
        tell(f"error: {one_line(error)}")
        return 2
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="opd_serve_"))
    tell(f"starting {args.replicas} x {args.model}; logs in {log_dir}")
    # the flags of the role that are the servers' options too
    names = (
        "protocol",
        "name",
        "tensor_parallel",
        "dtype",
        "max_logprobs",
        "kv_cache_gib",
        "weights_dir",
        "extra",
    )
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    try:
        with serving(
            path,
            replicas=args.replicas,
            gpus=args.gpus,
            log_dir=log_dir,
            start_seconds=args.start_timeout_s,
            **options,
        ) as replicas:
            for replica in replicas:
                tell(f"{replica.url}: process {replica.process.pid}")
            if args.role != "teacher":
                tell(
                    f"the trainer needs the same {TOKEN_VARIABLE}, and --weights_dir "
                    f"{args.weights_dir}"
                )
            print(entry(args, [replica.url for replica in replicas]), flush=True)
            return watch(
                replicas, restart=args.restart, start_seconds=args.start_timeout_s, say=tell
            )
    except StartError as error:
        tell(f"error: {error}")
        return 1


EARLY_SECONDS = 60.0


EARLY_DEATHS = 3


FIRST_WAIT = 1.0  # s before a start; twice that after each early death more


RETURN_SECONDS = (
    5.0  # for the first answer of a server that came back: the others are not watched meanwhile
)


@dataclass(slots=True)
class Restarts:
    """When one server is started again, and when no more.

    No I/O, no clock: times are those of a monotonic one, in seconds.
    """

    ready_at: float | None = None
    early_deaths: int = 0  # in a row

    def died(self, now: float) -> float | None:
        """How long to wait before the next start; None: it is given up."""
        late = self.ready_at is not None and now - self.ready_at >= EARLY_SECONDS
        self.early_deaths = 0 if late else self.early_deaths + 1
        self.ready_at = None
        if self.early_deaths >= EARLY_DEATHS:
            return None
        return FIRST_WAIT * 2 ** max(0, self.early_deaths - 1)


class _Watched:
    """A replica, and what became of it."""

    def __init__(self, replica: ServerProcess, start_seconds: float, say: Callable[[str], None]):
        self.replica, self.start_seconds, self.say = replica, start_seconds, say
        self.restarts = Restarts(ready_at=time.monotonic())
        self.next_start: float | None = None  # it is dead until then
        self.deadline = 0.0  # to be ready again

    @property
    def up(self) -> bool:
        """Whether it was ready when it was looked at last."""
        return self.restarts.ready_at is not None

    def look(self) -> bool:
        """Does what is to be done now. Whether it died since the last look."""
        now = time.monotonic()
        if self.next_start is not None:
            return now >= self.next_start and not self._started(now)
        if not self.replica.alive:
            return True
        if not self.up:
            if self.replica.is_ready(RETURN_SECONDS):
                self.restarts.ready_at = time.monotonic()
                self.say(f"{self.replica.url} is back: process {self.replica.process.pid}")
            elif now >= self.deadline:
                self.say(
                    f"{self.replica.url} is not ready within {self.start_seconds:g} s, and is "
                    "killed"
                )
                with suppress(subprocess.TimeoutExpired):  # a driver holds it: it is tried again
                    self.replica.kill()  # the next look finds it dead
        return False

    def _started(self, now: float) -> bool:
        self.next_start, self.deadline = None, now + self.start_seconds
        try:
            self.replica.restart()
        # no memory for a process, no log directory: it must not take the others along
        except OSError as error:
            self.say(f"{self.replica.url} cannot be started: {error}")
            return False
        return True


def watch(
    replicas: Sequence[ServerProcess],
    *,
    restart: bool,
    start_seconds: float,
    say: Callable[[str], None],
) -> int:
    """Says who dies, until all have and none is started again: then it returns 1."""
    watched = [_Watched(replica, start_seconds, say) for replica in replicas]
    while watched:
        time.sleep(LOOK_AGAIN_SECONDS)
        for one in [one for one in watched if one.look()]:
            wait = one.restarts.died(time.monotonic())
            if not restart or wait is None:
                watched.remove(one)
                then = f"; given up: its last {EARLY_DEATHS} deaths came early" if restart else ""
            else:
                one.next_start = time.monotonic() + wait
                then = f"; it is started again in {wait:g} s"
            replica, left = one.replica, sum(other.up for other in watched)
            say(
                f"{replica.url} died with status {replica.process.returncode}, {left} left{then}: "
                f"see {replica.log}\n"
                f"{replica.last_lines()}"
            )
    return 1


if __name__ == "__main__":
    sys.exit(launch())
