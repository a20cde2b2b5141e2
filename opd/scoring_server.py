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
import asyncio
import functools
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from opd import distributed
from opd.arguments import OneLineParser
from opd.content import content_hash
from opd.heads import load_head
from opd.hf_engine import HFEngine
from opd.http_service import bind, check_host, leave_on_signals, run_main, serve_app
from opd.preflight import ModelFact, read_fact
from opd.protocols import TOKEN_VARIABLE
from opd.scoring import BatchLimits, Scorer, ScoringThread, join_alone
from opd.scoring_routes import ModelInfo, Service
from opd.shapes import check_path, load_part, served_length
from opd.student import resolve_dtype
from opd.vllm_engine import HiddenStateEngine

LOAD_SECONDS = 1800.0  # for the engine to stand: a large model from a slow disk


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = OneLineParser("python -m opd.scoring_server", __doc__)
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
    args = parser.parse_args(argv)
    for flag in ("max_model_len", "max_support_k", "max_tokens_per_batch", "max_sequences_per_batch", "max_waiting"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if not args.batch_wait_ms >= 0 or not args.kv_cache_gib > 0:
        raise ValueError("--batch_wait_ms must be at least 0 and --kv_cache_gib above 0")
    args.name = args.name or Path(args.model).name
    args.tokenizer = args.tokenizer or args.model
    return args


def _read_model(args: argparse.Namespace) -> tuple[ModelFact, object]:
    """(facts, tokenizer). ValueError for a model that cannot be served; no weight is loaded."""
    check_path("--tokenizer", args.tokenizer)
    load = functools.partial(AutoTokenizer.from_pretrained, args.tokenizer, trust_remote_code=args.trust_remote_code)
    tokenizer = load_part("--tokenizer", args.tokenizer, "tokenizer", load)
    fact = read_fact("--model", args.model, tokenizer, args.trust_remote_code, vllm=args.backend == "vllm")
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


def serve(argv: list[str], token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    args = parse_arguments(argv)
    leave_on_signals()
    check_host(args.host, token)
    bound = bind(args.host, args.port)
    fact, tokenizer = _read_model(args)
    max_model_len = served_length(args.model, fact.context, args.max_model_len)
    limits = BatchLimits(args.max_tokens_per_batch, args.max_sequences_per_batch, args.batch_wait_ms / 1000)
    engine = ScoringThread(functools.partial(build_scorer, args, max_model_len), limits)
    engine.ready.result(timeout=LOAD_SECONDS)
    served = ModelInfo(
        name=args.name, model=args.model, content=content_hash(args.model), eos_ids=fact.eos_ids,
        max_model_len=max_model_len, max_support_k=min(args.max_support_k, fact.vocab_size),
    )  # fmt: skip
    app = Service(served, engine, tokenizer, max_waiting=args.max_waiting).app(token)
    asyncio.run(serve_app(app, bound, args.name))


if __name__ == "__main__":
    with distributed.exit_together():
        sys.exit(run_main(serve))
