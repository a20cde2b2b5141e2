"""`python -m opd.logprob_server --model M --weights_dir ROOT`: the student's log-probabilities, computed beside the trainer.

The trainer's forward behind a port: the same Hugging Face model, attention and dtype, with weights that the trainer pushes
through a directory (`opd/weight_store.py`) or sends (`opd/weight_broadcast.py`). docs/serving.md has the routes in detail:

| route | answer |
|---|---|
| `GET /health` | 200 while the event loop lives |
| `GET /version` | protocol, version of the weights, state, fence |
| `GET /metrics` | requests, tokens, batches; waiting, version of the weights, paused; in Prometheus' text form |
| `POST /logprobs` | raw int32 ids to safetensors: `logprobs` and `entropy` of the response's tokens |
| `POST /pause`, `/update_weights`, `/resume`, `/lease` | `opd/server_control.py` |

It starts stale and serves nothing until the first push; with `--serve_initial`, the model's own weights are version 0. It
listens on the loopback interface only, unless OPD_SERVER_TOKEN holds a token; without one, nobody may change its weights.
SIGTERM and SIGINT end it with status 0.
"""

import argparse
import asyncio
import functools
import sys
from pathlib import Path

import torch

from opd.arguments import OneLineParser
from opd.checkpoint_names import checkpoint_views
from opd.http_service import bind, check_host, leave_on_signals, run_main, serve_app
from opd.logprob_engine import LogprobScorer, load_model
from opd.logprob_routes import EngineHolder, Service
from opd.preflight import read_checked
from opd.protocols import LOGPROB, TOKEN_VARIABLE
from opd.scoring import BatchLimits, ScoringThread
from opd.server_control import Control, WeightsGate
from opd.shapes import served_length
from opd.student import resolve_dtype
from opd.weight_offer import Receivers, backend_of

LOAD_SECONDS = 1800.0  # for the model to stand: a large one from a slow disk


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = OneLineParser("python -m opd.logprob_server", __doc__)
    parser.add_argument("--model", required=True, help="the trainer's --student_model: directory or hub id")
    parser.add_argument("--weights_dir", required=True, type=Path, help="where the trainer publishes its weights")
    parser.add_argument("--serve_initial", action="store_true", help="the model's own weights are version 0")
    parser.add_argument("--host", default="127.0.0.1", help=f"another than loopback needs a token in {TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="the trainer's")
    parser.add_argument("--attn_implementation", default="auto", help="the trainer's")
    parser.add_argument("--max_model_len", type=int, help="tokens of prompt and response (default: the model's)")
    parser.add_argument("--max_tokens_per_batch", type=int, default=8192)
    parser.add_argument("--batch_wait_ms", type=float, default=2.0, help="for others to join a forward")
    parser.add_argument("--max_waiting", type=int, default=1024, help="questions at a time; beyond it they get 429")
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args(argv)
    for flag in ("max_model_len", "max_tokens_per_batch", "max_waiting"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not args.batch_wait_ms >= 0:
        raise ValueError(f"--batch_wait_ms {args.batch_wait_ms}: must be at least 0")
    return args


def _read_facts(args: argparse.Namespace) -> tuple[int, Receivers]:
    """(tokens that a question may have, who takes weights). ValueError for a model that cannot be served; none is loaded."""
    model = read_checked(
        "--model", args.model, args.trust_remote_code, vllm=False, attn_implementation=args.attn_implementation
    )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    receivers = Receivers(1, backend_of(_device()), checkpoint_views(model))
    return served_length(args.model, context, args.max_model_len), receivers


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_scorer(args: argparse.Namespace) -> LogprobScorer:
    """The model on its device, for the thread that will use it."""
    model = load_model(
        args.model, dtype=resolve_dtype(args.dtype), attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    model.to(_device())
    version = 0 if args.serve_initial else None
    return LogprobScorer(model, version=version, tokens_per_batch=args.max_tokens_per_batch)


def serve(argv: list[str], token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    args = parse_arguments(argv)
    leave_on_signals()
    check_host(args.host, token)
    bound = bind(args.host, args.port)
    max_model_len, receivers = _read_facts(args)
    limits = BatchLimits(args.max_tokens_per_batch, args.max_tokens_per_batch, args.batch_wait_ms / 1000)
    engine = ScoringThread(functools.partial(build_scorer, args), limits)
    gate = WeightsGate(engine.ready.result(timeout=LOAD_SECONDS).version)
    holder = EngineHolder(engine)
    control = Control(
        gate, holder, args.weights_dir, protocol=LOGPROB, token=token, receivers=receivers, max_model_len=max_model_len
    )
    app = Service(engine, control, max_model_len=max_model_len, max_waiting=args.max_waiting).app(token)
    asyncio.run(serve_app(app, bound, Path(args.model).name))


if __name__ == "__main__":
    sys.exit(run_main(serve))
