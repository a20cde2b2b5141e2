"""`python -m opd.servers.scoring_server --model M`: a teacher behind a port, which scores from
hidden states.

An HTTP server on the loopback interface around one engine that returns hidden states (`--backend
vllm` or `hf`), and the model's head. It says what a colocated teacher says, to the bit if
`--max_sequences_per_batch` is 1: scores with the exact log-sum-exp, or the hidden states
themselves, as raw arrays. docs/serving.md has the routes in detail:

| route | answer |
|---|---|
| `GET /health` | 200 while the event loop lives; whether the engine makes progress only a question tells |
| `GET /version`, `/v1/models`, `/info` | protocol, name and context as vLLM's, what the model is |
| `GET /metrics` | `opd_requests_total`, `opd_tokens_total`, `opd_batches_total`, `opd_waiting`, in Prometheus' text form |
| `GET /head` | safetensors: `weight_VH` and, if there is one, `bias_V` |
| `POST /tokenize` | `{"prompt": text, "add_special_tokens": false}` to `{"tokens": [...]}` |
| `POST /score` | raw int32 ids to safetensors of the fields of `wire.Question.shapes` |

`/score?prompt_length=&payload=&support_k=&temperature=&vocab=` takes the ids of prompt and
response. `vocab` is the number of the head's rows that all models of a run share. A mistake is 400,
a body that is too long 413, a queue that is full 429, a question that made the engine fail 500:
each with `{"error": one line}`. The server lives on.

It listens on the loopback interface only, unless OPD_SERVER_TOKEN holds a token; if it does, every
route but `/health` wants `Authorization: Bearer TOKEN`. SIGTERM and SIGINT end it with status 0.
"""  # noqa: E501

import argparse
import asyncio
import dataclasses
import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from transformers import AutoTokenizer

from opd import distributed
from opd.clients.protocols import SCORING
from opd.clients.seen import MOST_IMAGE_BYTES, MOST_IMAGES, decode_text
from opd.clients.wire import Question, encode_arrays
from opd.distributed import resolve_dtype
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.hub_names import as_named
from opd.inputs.content import content_hash
from opd.inputs.hub import fetch, find_snapshot
from opd.inputs.models import ModelFact, read_fact
from opd.inputs.shapes import check_path, load_part
from opd.log import one_line
from opd.ops.heads import load_head
from opd.pictures import PromptImages
from opd.servers.cache_size import CACHE_HELP, cache_and_length, cache_gib
from opd.servers.http_service import (
    LOAD_SECONDS,
    Admission,
    RequireToken,
    bind,
    check_flags,
    leave_on_signals,
    metrics_text,
    new_app,
    read_body,
    read_json,
    run_main,
    serve_app,
    server_parser,
    unless_gone,
)
from opd.servers.scoring_engine import BatchLimits, Scorer, ScoringThread, join_alone
from opd.types import TeacherPayload

SCORE_SECONDS = 600.0  # for the engine to compute; clients have shorter deadlines of their own
BYTES_PER_TOKEN_OF_TEXT = 16  # of a text to be tokenized; more is longer than the context
BINARY = "application/octet-stream"
BLOCK_BYTES = 1 << 22  # of a head, which is too large to be handed to a connection at once
LEAST_TEMPERATURE = 1e-3  # below, logits overflow
BATCH_FLAGS = ("max_model_len", "max_tokens_per_batch", "max_waiting")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Of a server whose engine answers several questions at a time; BATCH_FLAGS are at least 1."""
    parser.add_argument("--max_tokens_per_batch", type=int, default=8192)
    parser.add_argument(
        "--batch_wait_ms", type=float, default=2.0, help="for others to join a batch"
    )
    parser.add_argument(
        "--max_waiting", type=int, default=1024, help="questions at a time; beyond it they get 429"
    )


def scoring_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = server_parser(
        "opd.servers.scoring_server", __doc__, ["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--name", help="of the served model (default: the last part of --model)")
    parser.add_argument("--backend", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--kv_cache_gib", type=cache_gib, default="auto", help=CACHE_HELP)
    parser.add_argument("--max_support_k", type=int, default=1024)
    parser.add_argument("--max_sequences_per_batch", type=int, default=64)
    add_batch_flags(parser)
    parser.add_argument("--tokenizer", help="directory or hub id (default: --model)")
    args = parser.parse_args(argv)
    check_flags(args, at_least_1=["max_support_k", "max_sequences_per_batch", *BATCH_FLAGS])
    if not args.batch_wait_ms >= 0:
        raise ValueError(f"--batch_wait_ms {args.batch_wait_ms}: must be at least 0")
    args.name = args.name or Path(args.model).name
    args.tokenizer = args.tokenizer or args.model
    return args


def _read_model(args: argparse.Namespace) -> tuple[ModelFact, object]:
    """(facts, tokenizer). ValueError for a model that cannot be served; no weight is loaded."""
    check_path("--tokenizer", args.tokenizer)
    load = functools.partial(
        AutoTokenizer.from_pretrained, args.tokenizer, trust_remote_code=args.trust_remote_code
    )
    tokenizer = load_part("--tokenizer", args.tokenizer, "tokenizer", load)
    fact = read_fact(
        "--model", args.model, tokenizer, args.trust_remote_code, vllm=args.backend == "vllm"
    )
    return fact, tokenizer


def build_scorer(
    args: argparse.Namespace, kv_cache_gib: float, max_model_len: int, sees: bool
) -> Scorer:
    """Engine and head, for the thread that will use them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(args.dtype)
    options = {
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": args.trust_remote_code,
    }
    if args.backend == "hf":
        engine = HFEngine(args.name, args.model, device=device, residency="gpu", **options)
    else:
        join_alone()
        engine = HiddenStateEngine(
            args.name,
            args.model,
            tokenizer=args.tokenizer,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            kv_cache_grows=args.kv_cache_gib == "auto",
            residency="gpu",
            images_per_prompt=MOST_IMAGES if sees else None,
            **options,
        )
    return Scorer(engine, load_head(args.model).to(device), dtype)


def serve_scores(argv: list[str], token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    args = scoring_arguments(argv)
    leave_on_signals()
    bound = bind(args.host, args.port, token)
    own = args.tokenizer == args.model
    args.model = fetch("--model", args.model)
    args.tokenizer = args.model if own else find_snapshot("--tokenizer", args.tokenizer)
    fact, tokenizer = _read_model(args)
    kv_cache_gib, max_model_len = cache_and_length(
        fact if args.backend == "vllm" else dataclasses.replace(fact, cached=()),
        args.max_model_len,
        args.kv_cache_gib,
        width=resolve_dtype(args.dtype).itemsize,
        tokens=args.max_tokens_per_batch,
    )
    limits = BatchLimits(
        args.max_tokens_per_batch, args.max_sequences_per_batch, args.batch_wait_ms / 1000
    )
    engine = ScoringThread(
        functools.partial(build_scorer, args, kv_cache_gib, max_model_len, fact.sees), limits
    )
    engine.ready.result(timeout=LOAD_SECONDS)
    served = ModelInfo(
        name=args.name,
        model=as_named(args.model),
        content=content_hash(args.model),
        eos_ids=fact.eos_ids,
        max_model_len=max_model_len,
        max_support_k=min(args.max_support_k, fact.vocab_size),
        sees=fact.sees,
    )
    app = ScoringService(served, engine, tokenizer, max_waiting=args.max_waiting).app(token)
    asyncio.run(serve_app(app, bound, args.name))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server says about itself."""

    name: str
    model: str
    content: str  # its hash
    eos_ids: tuple[int, ...]
    max_model_len: int
    max_support_k: int
    sees: bool = False


class ScoringService:
    """The routes of one model."""

    def __init__(self, served: ModelInfo, engine: ScoringThread, tokenizer, *, max_waiting: int):
        self.served, self.engine, self.tokenizer = served, engine, tokenizer
        self.admission = Admission(max_waiting)
        self.scorer = engine.ready.result(timeout=0)  # whoever serves has waited for it
        head = self.scorer.head
        bias = {} if head.bias_V is None else {"bias_V": head.bias_V}
        self.head_body = encode_arrays({"weight_VH": head.weight_VH} | bias)

    def app(self, token: str | None) -> Callable:
        """The ASGI application; with a token only /health is open."""
        app = new_app()
        for path in ("health", "version", "info", "metrics", "head"):
            app.add_api_route(f"/{path}", getattr(self, path), methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/score", self.score, methods=["POST"])
        return app if token is None else RequireToken(app, token)

    async def health(self) -> Response:
        return Response()

    async def version(self) -> dict[str, str]:
        return {"version": "1", "protocol": SCORING}

    async def models(self) -> dict[str, Any]:
        served = self.served
        entry = {
            "id": served.name,
            "object": "model",
            "root": served.model,
            "max_model_len": served.max_model_len,
        }
        return {"object": "list", "data": [entry]}

    async def info(self) -> dict[str, Any]:
        served, head = self.served, self.scorer.head
        vocab_size, hidden_size = head.weight_VH.shape
        return {
            "content": served.content,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "eos_ids": served.eos_ids,
            "max_support_k": served.max_support_k,
            "max_model_len": served.max_model_len,
            "dtype": str(self.scorer.dtype).removeprefix("torch."),
            "logit_scale": head.form.scale,
            "logit_softcap": head.form.softcap,
            "has_bias": head.bias_V is not None,
            "sees": served.sees,
        }

    async def metrics(self) -> Response:
        engine = self.engine
        counts = {"requests": engine.requests, "tokens": engine.tokens, "batches": engine.batches}
        return metrics_text(counts, {"waiting": engine.waiting})

    async def head(self) -> Response:
        body = memoryview(self.head_body)
        blocks = (body[start : start + BLOCK_BYTES] for start in range(0, len(body), BLOCK_BYTES))
        return StreamingResponse(
            blocks, media_type=BINARY, headers={"Content-Length": str(len(body))}
        )

    async def tokenize(self, request: Request) -> dict[str, list[int]]:
        content = await read_json(request, BYTES_PER_TOKEN_OF_TEXT * self.served.max_model_len)
        text, special = content.get("prompt"), content.get("add_special_tokens", False)
        if not isinstance(text, str) or not isinstance(special, bool):
            raise HTTPException(
                400, 'expected {"prompt": text, "add_special_tokens": true or false}'
            )
        encode = functools.partial(self.tokenizer.encode, text, add_special_tokens=special)
        try:
            return {"tokens": await asyncio.to_thread(encode)}
        except (ValueError, TypeError) as error:  # half of a surrogate pair, for one
            raise HTTPException(400, f"not a text: {one_line(error)}") from None

    async def score(
        self,
        request: Request,
        prompt_length: int,
        payload: TeacherPayload,
        support_k: int = 0,
        temperature: float = 1.0,
        vocab: int | None = None,
        ids: int | None = None,
    ) -> Response:
        with self.admission.of_one():
            room = MOST_IMAGE_BYTES if self.served.sees and ids is not None else 0
            body = await read_body(request, 4 * self.served.max_model_len + room)
            try:
                text = await asyncio.to_thread(self._text, body, ids, prompt_length)
                question = self._question(
                    *text, prompt_length, payload, support_k, temperature, vocab
                )
            except ValueError as error:
                raise HTTPException(400, one_line(error)) from None
            return await answer_or_give_up(request, self.engine.submit(question))

    def _text(
        self, body: bytes, num_ids: int | None, prompt_length: int
    ) -> tuple[list[int], PromptImages | None]:
        if num_ids is not None and not self.served.sees:
            raise ValueError(f"{self.served.name} sees no images")
        size, most = len(self.scorer.head.weight_VH), self.served.max_model_len
        return decode_text(body, num_ids, prompt_length, vocab=size, most=most)

    def _question(
        self,
        ids: list[int],
        images: PromptImages | None,
        prompt_length: int,
        payload: TeacherPayload,
        support_k: int,
        temperature: float,
        vocab: int | None,
    ) -> Question:
        """Raises ValueError for what cannot be answered."""
        size, hidden_size = self.scorer.head.weight_VH.shape
        vocab = size if vocab is None else vocab
        if not 1 <= vocab <= size:
            raise ValueError(f"vocab={vocab}: must be 1 to {size}")
        if not 1 <= prompt_length <= len(ids):
            raise ValueError(
                f"prompt_length={prompt_length}: must be 1 to the number of token ids, {len(ids)}"
            )
        if not LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature}: must be {LEAST_TEMPERATURE:g} to "
                f"{1 / LEAST_TEMPERATURE:g}"
            )
        most = min(vocab, self.served.max_support_k)
        if "topk" in payload and not 1 <= support_k <= most:
            raise ValueError(f"support_k={support_k}: must be 1 to {most}")
        if "topk" not in payload and support_k:
            raise ValueError(
                f"support_k={support_k}: payload {payload} has no support; leave it out"
            )
        response_ids = ids[prompt_length:]
        if response_ids and max(response_ids) >= vocab:
            raise ValueError(
                f"response token {max(response_ids)} is outside the {vocab} tokens of vocab"
            )
        return Question(
            ids[:prompt_length],
            response_ids,
            payload,
            support_k,
            vocab,
            temperature,
            hidden_size,
            images,
        )


def binary(body: bytes) -> Response:
    """Raw arrays."""
    return Response(body, media_type=BINARY)


async def answer_or_give_up(
    request: Request, answer: Future, respond: Callable[[Any], Response] = binary
) -> Response:
    """What `respond` makes of the answer. A question whose client has gone is taken back."""
    try:
        return respond(await unless_gone(request, asyncio.wrap_future(answer), SCORE_SECONDS))
    except TimeoutError:
        return JSONResponse({"error": f"no answer within {SCORE_SECONDS:g} s"}, 503)
    except ClientDisconnect:
        raise
    except Exception as error:  # the engine thread has printed it; the client hears it too
        return JSONResponse({"error": f"{type(error).__name__}: {one_line(error)}"}, 500)


if __name__ == "__main__":
    with distributed.exit_together():
        sys.exit(run_main(serve_scores))
