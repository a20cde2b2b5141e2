"""`python -m opd.servers.logprob_server --model M --weights_dir ROOT`: the student's
log-probabilities, computed beside the trainer.

The trainer's forward behind a port: the same Hugging Face model, attention and dtype, with weights
that the trainer pushes through a directory (`opd/weights/store.py`). docs/serving.md has the routes
in detail:

| route | answer |
|---|---|
| `GET /health` | 200 while the event loop lives |
| `GET /version` | protocol, version of the weights, state, fence |
| `GET /metrics` | requests, tokens, batches; waiting, queued, version of the weights, paused; in Prometheus' text form |
| `POST /logprobs` | raw int32 ids to safetensors: `logprobs` and `entropy` of the response's tokens |
| `POST /pause`, `/update_weights`, `/resume`, `/lease` | `opd/servers/control.py` |

It starts stale and serves nothing until the first push; with `--serve_initial`, the model's own
weights are version 0. It listens on the loopback interface only, unless OPD_SERVER_TOKEN holds a
token; without one, nobody may change its weights. SIGTERM and SIGINT end it with status 0.
"""  # noqa: E501

import argparse
import asyncio
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException, Request
from fastapi.responses import Response

from opd.clients.protocols import LOGPROB
from opd.clients.seen import MOST_IMAGE_BYTES, decode_text
from opd.clients.wire import VERSION_HEADER, LogprobQuestion
from opd.distributed import resolve_dtype
from opd.hub_names import as_named
from opd.inputs.hub import fetch
from opd.inputs.models import read_checked
from opd.inputs.shapes import served_length
from opd.log import one_line
from opd.ops.pixels import Pixels
from opd.servers.control import ACT_SECONDS, Control, PauseMode, WeightsGate, add_weight_flags
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
    run_main,
    serve_app,
    server_parser,
)
from opd.servers.logprob_engine import LogprobScorer, VersionedBody, load_model
from opd.servers.scoring_engine import BatchLimits, ScoringThread
from opd.servers.scoring_server import BATCH_FLAGS, add_batch_flags, answer_or_give_up, binary


def logprob_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = server_parser("opd.servers.logprob_server", __doc__, ["bfloat16", "float32"])
    parser.add_argument("--attn_implementation", default="auto", help="the trainer's")
    add_weight_flags(parser)
    add_batch_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args, at_least_1=BATCH_FLAGS)
    if not args.batch_wait_ms >= 0:
        raise ValueError(f"--batch_wait_ms {args.batch_wait_ms}: must be at least 0")
    return args


def _longest_question(args: argparse.Namespace) -> int:
    """Tokens. ValueError for a model that cannot be served; none is loaded."""
    model = read_checked(
        "--model",
        args.model,
        args.trust_remote_code,
        vllm=False,
        attn_implementation=args.attn_implementation,
    )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return served_length(args.model, context, args.max_model_len)


def build_logprob_scorer(args: argparse.Namespace) -> LogprobScorer:
    """The model on its device, for the thread that will use it."""
    model = load_model(
        args.model,
        dtype=resolve_dtype(args.dtype),
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    version = 0 if args.serve_initial else None
    return LogprobScorer(
        model,
        version=version,
        tokens_per_batch=args.max_tokens_per_batch,
        pixels=Pixels(args.model, args.trust_remote_code),
    )


def serve_logprobs(argv: list[str], token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    args = logprob_arguments(argv)
    leave_on_signals()
    bound = bind(args.host, args.port, token)
    args.model = fetch("--model", args.model)
    max_model_len = _longest_question(args)
    limits = BatchLimits(
        args.max_tokens_per_batch, args.max_tokens_per_batch, args.batch_wait_ms / 1000
    )
    engine = ScoringThread(functools.partial(build_logprob_scorer, args), limits)
    gate = WeightsGate(engine.ready.result(timeout=LOAD_SECONDS).version)
    holder = EngineHolder(engine)
    control = Control(
        gate, holder, args.weights_dir, protocol=LOGPROB, token=token, max_model_len=max_model_len
    )
    app = LogprobService(
        engine, control, max_model_len=max_model_len, max_waiting=args.max_waiting
    ).app(token)
    asyncio.run(serve_app(app, bound, Path(as_named(args.model)).name))


class EngineHolder:
    """`control.Holder` of an engine whose thread does everything in order.

    Whatever is in its queue when the gate closes is answered by the old weights, in either mode: a
    forward takes no longer than its end would.
    """

    def __init__(self, engine: ScoringThread):
        self.engine = engine

    async def pause(self, mode: PauseMode) -> None:
        """Returns when every question that passed the gate has its answer."""
        await self._in_turn(lambda scorer: None)

    async def load(self, directory: Path, version: int) -> None:
        """There are no caches to reset."""
        await self._in_turn(lambda scorer: scorer.load(directory, version))

    async def resume(self) -> None:
        """Nothing was kept."""

    async def _in_turn(self, act: Callable[[Any], Any]) -> None:
        async with asyncio.timeout(ACT_SECONDS):
            await asyncio.wrap_future(self.engine.do(act))


class LogprobService:
    """The routes of one model."""

    def __init__(
        self, engine: ScoringThread, control: Control, *, max_model_len: int, max_waiting: int
    ):
        self.engine, self.control, self.max_model_len = engine, control, max_model_len
        self.admission = Admission(max_waiting)
        # whoever serves has waited for it
        scorer = engine.ready.result(timeout=0)
        self.vocab_size, self.sees = scorer.vocab_size, scorer.sees

    def app(self, token: str | None) -> Callable:
        """The ASGI application; with a token only /health is open."""
        app = new_app()
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/logprobs", self.logprobs, methods=["POST"])
        self.control.mount(app)
        return app if token is None else RequireToken(app, token)

    async def health(self) -> Response:
        return Response()

    async def metrics(self) -> Response:
        engine, gate = self.engine, self.control.gate
        counts = {"requests": engine.requests, "tokens": engine.tokens, "batches": engine.batches}
        version = -1 if gate.version is None else gate.version
        gauges = {
            "waiting": self.admission.admitted,
            "queued": engine.waiting,  # of them those that a pause does not hold back any more
            "weights_version": version,
            "paused": int(gate.state == "paused"),
        }
        return metrics_text(counts, gauges)

    async def logprobs(
        self, request: Request, prompt_length: int, temperature: float = 1.0, ids: int | None = None
    ) -> Response:
        with self.admission.of_one():
            room = MOST_IMAGE_BYTES if self.sees and ids is not None else 0
            body = await read_body(request, 4 * self.max_model_len + room)
            try:
                question = await asyncio.to_thread(
                    self._question, body, prompt_length, temperature, ids
                )
            except ValueError as error:
                raise HTTPException(400, one_line(error)) from None
            await self.control.ready()
            # Nothing is awaited between the gate and the queue: a pause comes before both or after
            # both.
            return await answer_or_give_up(request, self.engine.submit(question), _respond)

    def _question(
        self, body: bytes, prompt_length: int, temperature: float, num_ids: int | None
    ) -> LogprobQuestion:
        """Raises ValueError for what cannot be answered."""
        if num_ids is not None and not self.sees:
            raise ValueError("the model sees no images")
        ids, images = decode_text(
            body, num_ids, prompt_length, vocab=self.vocab_size, most=self.max_model_len
        )
        if not 1 <= prompt_length <= len(ids):
            raise ValueError(
                f"prompt_length={prompt_length}: must be 1 to the number of token ids, {len(ids)}"
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature}: must be above 0 and finite")
        return LogprobQuestion(ids[:prompt_length], ids[prompt_length:], temperature, images)


def _respond(answer: VersionedBody) -> Response:
    response = binary(answer.body)
    response.headers[VERSION_HEADER] = str(answer.version)
    return response


if __name__ == "__main__":
    sys.exit(run_main(serve_logprobs))
