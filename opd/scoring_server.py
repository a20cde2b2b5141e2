"""`python -m opd.scoring_server --model M`: a teacher behind a port, which scores from hidden states.

An HTTP server on the loopback interface around one engine that returns hidden states (`--backend vllm` or `hf`), and the
model's head. It says what a colocated teacher says, to the bit if `--max_sequences_per_batch` is 1: scores with the exact
log-sum-exp, or the hidden states themselves, as raw arrays. docs/serving.md has the routes in detail:

| route | answer |
|---|---|
| `GET /health` | 200 while the event loop lives; whether the engine makes progress only a question tells |
| `GET /version`, `/v1/models`, `/info` | protocol, name and context as vLLM's, what the model is |
| `GET /metrics` | `opd_requests_total`, `opd_tokens_total`, `opd_batches_total`, `opd_waiting`, in Prometheus' text form |
| `GET /head` | safetensors: `weight_VH` and, if there is one, `bias_V` |
| `POST /tokenize` | `{"prompt": text, "add_special_tokens": false}` to `{"tokens": [...]}` |
| `POST /score` | raw int32 ids to safetensors of the fields of `wire.Question.shapes` |

`/score?prompt_length=&payload=&support_k=&temperature=&vocab=` takes the ids of prompt and response. `vocab` is the number
of the head's rows that all models of a run share. A mistake is 400, a body that is too long 413, a queue that is full 429, a
question that made the engine fail 500: each with `{"error": one line}`. The server lives on.

It listens on the loopback interface only, unless OPD_SERVER_TOKEN holds a token; if it does, every route but `/health`
wants `Authorization: Bearer TOKEN`. SIGTERM and SIGINT end it with status 0.
"""

import argparse
import functools
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import uvicorn
from transformers import AutoTokenizer

from opd.content import content_hash
from opd.heads import load_head
from opd.hf_engine import HFEngine
from opd.preflight import ModelFact, read_fact
from opd.rows import one_line
from opd.scoring import BatchLimits, Scorer, ScoringThread, join_alone
from opd.scoring_routes import ModelInfo, Service
from opd.shapes import check_path, load_part
from opd.student import resolve_dtype
from opd.vllm_engine import HiddenStateEngine

TOKEN_VARIABLE, SHORTEST_TOKEN = "OPD_SERVER_TOKEN", 16
LOAD_SECONDS = 1800.0  # for the engine to stand: a large model from a slow disk
END_SECONDS = 5  # for answers under way when the server is told to end


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m opd.scoring_server", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--name", help="of the served model (default: the last part of --model)")
    parser.add_argument("--backend", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--host", default="127.0.0.1", help=f"another than loopback needs a token in {TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--max_model_len", type=int, help="tokens of prompt and response (default: the model's)")
    parser.add_argument("--kv_cache_gib", type=float, default=0.25, help="KV cache of a vllm engine, GiB")
    parser.add_argument("--max_support_k", type=int, default=1024)
    parser.add_argument("--max_tokens_per_batch", type=int, default=8192)
    parser.add_argument("--max_sequences_per_batch", type=int, default=64)
    parser.add_argument("--batch_wait_ms", type=float, default=2.0, help="for others to join a prefill")
    parser.add_argument("--max_waiting", type=int, default=1024, help="questions at a time; beyond it they get 429")
    parser.add_argument("--tokenizer", help="directory or hub id (default: --model)")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.error = _raise
    args = parser.parse_args(argv)
    for flag in ("max_model_len", "max_support_k", "max_tokens_per_batch", "max_sequences_per_batch", "max_waiting"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not args.batch_wait_ms >= 0 or not args.kv_cache_gib > 0:
        raise ValueError("--batch_wait_ms must be at least 0 and --kv_cache_gib above 0")
    args.name = args.name or Path(args.model).name
    args.tokenizer = args.tokenizer or args.model
    return args


def _raise(message: str):
    raise ValueError(message)


def read_token() -> str | None:
    """The token of OPD_SERVER_TOKEN, None without one. ValueError for one that could be guessed."""
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ValueError(f"{TOKEN_VARIABLE}: {len(token)} characters; take at least {SHORTEST_TOKEN}, or unset it")
    return token


def check_host(host: str, token: str | None) -> None:
    """ValueError for a host that others reach, unless they need a token."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and token is None:
        raise ValueError(
            f"--host {host}: other machines would reach a server that asks for no token; put one of at least "
            f"{SHORTEST_TOKEN} characters into {TOKEN_VARIABLE}, or listen on 127.0.0.1 and use a tunnel (ssh -L)"
        )


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until the engine stands."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {one_line(error)}") from None
    return bound


def _read_model(args: argparse.Namespace) -> tuple[ModelFact, object]:
    """(facts, tokenizer). ValueError for a model that cannot be served; no weight is loaded."""
    check_path("--tokenizer", args.tokenizer)
    load = functools.partial(AutoTokenizer.from_pretrained, args.tokenizer, trust_remote_code=args.trust_remote_code)
    tokenizer = load_part("--tokenizer", args.tokenizer, "tokenizer", load)
    fact = read_fact("--model", args.model, tokenizer, args.trust_remote_code)
    if fact.context is None and args.max_model_len is None:
        raise ValueError(f"--model {args.model} states no context length; give --max_model_len")
    if fact.context is not None and (args.max_model_len or 0) > fact.context:
        raise ValueError(
            f"--max_model_len {args.max_model_len}: over the {fact.context} tokens of {args.model}; lower it"
        )
    return fact, tokenizer


def build_scorer(args: argparse.Namespace, max_model_len: int) -> Scorer:
    """Engine and head, for the thread that will use them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(args.dtype)
    options = {"dtype": str(dtype).removeprefix("torch."), "trust_remote_code": args.trust_remote_code}
    if args.backend == "hf":
        engine = HFEngine(args.name, args.model, device=device, residency="gpu", **options)
    else:
        join_alone()
        engine = HiddenStateEngine(
            args.name, args.model, tokenizer=args.tokenizer, max_model_len=max_model_len,
            kv_cache_gib=args.kv_cache_gib, residency="gpu", **options,
        )  # fmt: skip
    return Scorer(engine, load_head(args.model).to(device), dtype)


def _leave(signum, frame) -> None:
    """The end: nothing is left to save, and an engine that loads or computes would keep the interpreter waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def serve(args: argparse.Namespace, token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave)
    check_host(args.host, token)
    bound = _bind(args.host, args.port)
    fact, tokenizer = _read_model(args)
    max_model_len = args.max_model_len or fact.context
    limits = BatchLimits(args.max_tokens_per_batch, args.max_sequences_per_batch, args.batch_wait_ms / 1000)
    engine = ScoringThread(functools.partial(build_scorer, args, max_model_len), limits)
    engine.ready.result(timeout=LOAD_SECONDS)
    served = ModelInfo(
        name=args.name, model=args.model, content=content_hash(args.model), eos_ids=fact.eos_ids,
        max_model_len=max_model_len, max_support_k=min(args.max_support_k, fact.vocab_size),
    )  # fmt: skip
    app = Service(served, engine, tokenizer, max_waiting=args.max_waiting).app(token)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off",
        timeout_graceful_shutdown=END_SECONDS,
    )  # fmt: skip
    bound.listen()
    host, port = bound.getsockname()[:2]
    print(f"serving {args.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[bound])  # at its end it raises the signal again, which then is `_leave`'s


def main() -> int:
    """Exit status 2 for a mistake, 0 after a signal."""
    try:
        token = read_token()
        serve(parse_arguments(sys.argv[1:]), token)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
