"""`scripts/serve_teacher.sh MODEL`: a teacher's servers on this machine, and the YAML entry that names them to a trainer.

Starts `--replicas` servers on loopback ports, `--tensor_parallel` GPUs each, waits until every one has answered a question,
prints the entry on stdout and stays until SIGINT or SIGTERM. Flags behind `--` go to the servers as they are. The exit status
is 0 after a signal, 2 for a mistake, 1 if a server does not come up or all have died.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from opd.arguments import OneLineParser
from opd.protocols import TOKEN_VARIABLE
from opd.replicas import POLL_SECONDS, START_SECONDS, Replica, StartError, serving
from opd.rows import one_line
from opd.shapes import check_path

PLAIN_SCALAR = re.compile(r"[A-Za-z/~][\w./~+-]*")  # what YAML reads as the text that it is; with true and null below
YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "~"}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, extra = argv[:end], argv[end + 1 :]
    for word in argv:
        if word.partition("=")[0] in ("--host", "--port", "--uds"):
            raise ValueError(
                f"{word}: these servers listen on loopback ports that the kernel chooses; from another machine reach one "
                "through a tunnel: ssh -L PORT:127.0.0.1:PORT THIS_MACHINE"
            )
    parser = OneLineParser("scripts/serve_teacher.sh", __doc__)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--tensor_parallel", type=int, default=1, help="GPUs of each replica (json only)")
    parser.add_argument("--gpus", help="such as 0,1,2,3 (default: all that are visible)")
    parser.add_argument("--protocol", choices=["binary", "json"], default="binary")
    parser.add_argument("--name", help="of the teacher (default: the last part of MODEL)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--max_logprobs", type=int, default=1024, help="the largest --support_k of a trainer")
    parser.add_argument("--kv_cache_gib", type=float, default=1.0, help="KV cache of each replica per GPU, GiB")
    parser.add_argument("--log_dir", type=Path, help="of the servers' logs (default: a temporary directory)")
    parser.add_argument("--start_timeout_s", type=float, default=START_SECONDS, help="for all replicas to answer")
    args = parser.parse_args(own)
    args.extra = extra
    _check(args)
    args.gpus = deal_gpus(args.gpus, args.replicas * args.tensor_parallel)
    return args


def _check(args: argparse.Namespace) -> None:
    for flag in ("replicas", "tensor_parallel", "max_logprobs", "kv_cache_gib", "start_timeout_s"):
        if not getattr(args, flag) > 0:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be above 0")
    if args.protocol == "binary" and args.tensor_parallel > 1:
        raise ValueError(
            f"--tensor_parallel {args.tensor_parallel}: the binary protocol's engine has one GPU; use --protocol json"
        )
    check_path("MODEL", args.model)
    args.name = args.name or Path(args.model).resolve().name


def deal_gpus(flag: str | None, needed: int) -> list[str]:
    """The first `needed` GPUs of `--gpus`, or of those that are visible; none on a machine without. ValueError for too few."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = [name.strip() for name in (flag or visible).split(",") if name.strip()]
    if flag is not None and not count:
        raise ValueError(f"--gpus {flag}: no GPU is visible here; leave it out to serve on the CPU")
    if len(set(gpus)) != len(gpus):
        raise ValueError(f"--gpus {flag}: a GPU stands there twice")
    if count and len(gpus) < needed:
        raise ValueError(f"--replicas times --tensor_parallel needs {needed} GPUs, and there are {len(gpus)}: {gpus}")
    return gpus[:needed] if count else []


def yaml_entry(name: str, model: str, urls: Sequence[str]) -> str:
    """What a trainer's YAML file takes."""

    def text(value: str) -> str:
        plain = PLAIN_SCALAR.fullmatch(value) and value.lower() not in YAML_WORDS
        return value if plain else json.dumps(value)

    key = f", api_key_env: {TOKEN_VARIABLE}" if os.environ.get(TOKEN_VARIABLE) else ""
    fields = f"name: {text(name)}, model: {text(model)}, backend: server, urls: {json.dumps(list(urls))}{key}"
    return f"teachers:\n  - {{{fields}}}"


def watch(replicas: Sequence[Replica]) -> int:
    """Says who dies. Returns 1 when all have."""
    living = list(replicas)
    while living:
        time.sleep(POLL_SECONDS)
        for replica in [replica for replica in living if not replica.alive]:
            living.remove(replica)
            status = replica.process.returncode
            say(
                f"{replica.url} died with status {status}, {len(living)} left: see {replica.log}\n{replica.last_lines()}"
            )
    return 1


def say(message: str) -> None:
    """To whoever started the servers; stdout is for the entry."""
    print(message, file=sys.stderr, flush=True)


def _end(signum, frame) -> None:
    for same in (signal.SIGTERM, signal.SIGINT):
        signal.signal(same, signal.SIG_IGN)  # the end is on its way
    sys.exit(0)


def main() -> int:
    """Exit status; a signal is a SystemExit that ends the servers on its way out."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end)
    try:
        args = parse_arguments(sys.argv[1:])
    except ValueError as error:
        say(f"error: {one_line(error)}")
        return 2
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="opd_serve_"))
    say(f"starting {args.replicas} x {args.model}; logs in {log_dir}")
    try:
        with serving(
            args.model, replicas=args.replicas, gpus=args.gpus, log_dir=log_dir, start_seconds=args.start_timeout_s,
            name=args.name, protocol=args.protocol, tensor_parallel=args.tensor_parallel,
            dtype=args.dtype, max_logprobs=args.max_logprobs,
            kv_cache_gib=args.kv_cache_gib, extra=args.extra,
        ) as replicas:  # fmt: skip
            for replica in replicas:
                say(f"{replica.url}: process {replica.process.pid}")
            print(yaml_entry(args.name, args.model, [replica.url for replica in replicas]), flush=True)
            return watch(replicas)
    except StartError as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
