"""`python -m opd.servers.rollout_server --model M --weights_dir ROOT`: samples responses, with
weights that a trainer pushes.

Our own routes around vLLM's engine, so that none of vLLM's development routes is ever open.
docs/serving.md has them:

| route | answer |
|---|---|
| `GET /health` | 200 while the event loop and the engine's process live |
| `GET /metrics` | requests, tokens, aborted, running, waiting, engine steps and the weights' version, in Prometheus' text form |
| `POST /generate` | `{"request_id", "prompt_ids", "seed", "max_tokens", ...}` to token ids, log-probabilities and versions |
| `GET /version`, `POST /pause`, `/update_weights`, `/resume`, `/lease` | see `opd.servers.control` |

A server is stale until the first push is complete, unless `--serve_initial` says that M's own
weights are version 0.
"""  # noqa: E501

import argparse
import asyncio
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import msgspec
import psutil
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from starlette.requests import ClientDisconnect

from opd.clients.protocols import ROLLOUT
from opd.clients.seen import MOST_IMAGE_BYTES, MOST_IMAGES, decode_images
from opd.distributed import resolve_dtype
from opd.inputs.hub import fetch
from opd.inputs.models import read_checked
from opd.inputs.shapes import shape_of
from opd.log import one_line
from opd.ops.model_class import sees_images
from opd.servers import http_service
from opd.servers.cache_size import CACHE_HELP, cache_and_length, cache_gib
from opd.servers.control import Control, WeightsGate, add_weight_flags
from opd.servers.rollout_engine import PushedEngine, Sampling

ANSWER_SECONDS = (
    3600.0  # for a response, its pauses included; clients have shorter deadlines of their own
)
RESPONSE_TOKENS_AT_ONCE = 1 << 20  # of all responses that are written at once, where there is room
WARM_UP_SECONDS = 600.0  # for the engine to compile
ROLLOUT_END_SECONDS = (
    1  # for answers under way when the server is told to end: their client asks again elsewhere
)
CHILD_SECONDS = 2.0  # for the engine's process to end by itself
BYTES_PER_ID, BYTES_BESIDE_IDS = 12, 1 << 16


def rollout_arguments(argv: list[str]) -> argparse.Namespace:
    """ValueError with one line for a mistake."""
    parser = http_service.server_parser(
        "opd.servers.rollout_server", __doc__, ["bfloat16", "float16", "float32"]
    )
    add_weight_flags(parser)
    parser.add_argument("--name", help="of the served model (default: the last part of --model)")
    parser.add_argument("--kv_cache_gib", type=cache_gib, default="auto", help=CACHE_HELP)
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the engine; a request has its own")
    parser.add_argument(
        "--enforce_eager", action="store_true", help="no compilation, no CUDA graphs"
    )
    args = parser.parse_args(argv)
    http_service.check_flags(args, at_least_1=["tensor_parallel", "max_model_len"])
    args.name = args.name or Path(args.model).name
    return args


class RolloutService:
    """The routes of one engine."""

    def __init__(
        self,
        engine: PushedEngine,
        control: Control,
        *,
        vocab_size: int,
        max_model_len: int,
        sees: bool = False,
    ):
        self.engine, self.control, self.vocab_size, self.max_model_len = (
            engine,
            control,
            vocab_size,
            max_model_len,
        )
        self.sees = sees

    def app(self, token: str | None) -> Callable:
        """The ASGI application; with a token only /health is open."""
        app = http_service.new_app()
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/generate", self.generate, methods=["POST"])
        self.control.mount(app)
        return app if token is None else http_service.RequireToken(app, token)

    async def health(self) -> HttpResponse:
        return HttpResponse(status_code=503 if self.engine.dead else 200)

    async def metrics(self) -> HttpResponse:
        engine, version = self.engine, self.control.gate.version
        counters = {
            "requests": engine.requests,
            "tokens": engine.tokens,
            "aborted": engine.aborted,
            "engine_steps": engine.steps,
        }
        gauges = {"running": engine.running, "waiting": engine.waiting}
        gauges["weights_version"] = -1 if version is None else version
        return http_service.metrics_text(counters, gauges)

    async def generate(self, request: Request) -> HttpResponse:
        body = await http_service.read_json(
            request,
            BYTES_PER_ID * self.max_model_len
            + BYTES_BESIDE_IDS
            + (MOST_IMAGE_BYTES if self.sees else 0),
        )
        try:
            name, sampling = read_sampling(
                body, vocab_size=self.vocab_size, max_model_len=self.max_model_len, sees=self.sees
            )
        except ValueError as error:
            raise HTTPException(400, one_line(error)) from None
        try:
            answer = asyncio.create_task(self._sample(name, sampling))
            return JSONResponse(
                asdict(await http_service.unless_gone(request, answer, ANSWER_SECONDS))
            )
        except TimeoutError:
            return JSONResponse({"error": f"no answer within {ANSWER_SECONDS:g} s"}, 503)
        except (ClientDisconnect, HTTPException):
            raise
        except Exception as error:  # whatever the engine raises, the client hears of it
            if self.engine.dead:
                print(
                    f"the engine is dead: {type(error).__name__}: {one_line(error)}",
                    file=sys.stderr,
                    flush=True,
                )
                # a server that cannot compute must not look alive
                os.kill(os.getpid(), signal.SIGTERM)
            return JSONResponse({"error": f"{type(error).__name__}: {one_line(error)}"}, 500)

    async def _sample(self, name: str, sampling: Sampling):
        await self.control.ready()
        async with asyncio.timeout(ANSWER_SECONDS):
            return await self.engine.generate(name, sampling)


def read_sampling(
    body: dict, *, vocab_size: int, max_model_len: int, sees: bool = False
) -> tuple[str, Sampling]:
    """(request id, what to sample) of a question. ValueError for one that makes no sense."""
    known = {"request_id", *Sampling.__dataclass_fields__}
    if unknown := sorted(set(body) - known):
        raise ValueError(
            f"unknown: {', '.join(unknown)[:100]}; known are {', '.join(sorted(known))}"
        )
    name = body.get("request_id", "")
    if not isinstance(name, str) or len(name) > 200:
        raise ValueError("request_id: must be a text of at most 200 characters")
    prompt_ids, stop_ids = (_ids(body, key, vocab_size) for key in ("prompt_ids", "stop_ids"))
    if not prompt_ids:
        raise ValueError("prompt_ids: at least one token")
    images = body.get("images")
    if images is not None:
        if not sees:
            raise ValueError("images: the model sees none")
        images = decode_images(msgspec.json.encode(images), len(prompt_ids), vocab=vocab_size)
    max_tokens = _number(body, "max_tokens", None, int, 1, max_model_len - len(prompt_ids))
    sampling = Sampling(
        prompt_ids=prompt_ids,
        seed=_number(body, "seed", None, int, -(1 << 63), (1 << 63) - 1),
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 1.0, float, 0.0, 1e6),
        top_p=_number(body, "top_p", 1.0, float, 1e-9, 1.0),
        top_k=_number(body, "top_k", 0, int, 0, vocab_size),
        stop_ids=tuple(stop_ids),
        with_logprobs=body.get("with_logprobs", True),
        images=images,
    )
    if not isinstance(sampling.with_logprobs, bool):
        raise ValueError("with_logprobs: must be true or false")
    return name, sampling


def _ids(body: dict, key: str, vocab_size: int) -> list[int]:
    ids = body.get(key, [])
    if not isinstance(ids, list) or not all(
        type(token) is int and 0 <= token < vocab_size for token in ids
    ):
        raise ValueError(f"{key}: must be a list of token ids from 0 to {vocab_size - 1}")
    return ids


def _number(body: dict, key: str, default, kind: type, least, most):
    value = body.get(key, default)
    right = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if not right or not least <= value <= most:
        raise ValueError(
            f"{key}: {value!r}: must be {'an integer' if kind is int else 'a number'}, {least} to "
            f"{most}"
        )
    return kind(value)


def _end_children() -> None:
    """vllm 0.32's engine process does not notice that its server has gone."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    _, alive = psutil.wait_procs(children, timeout=CHILD_SECONDS)
    for child in alive:
        child.kill()


def _rollout_facts(args: argparse.Namespace) -> tuple[int, float, int, bool]:
    """(vocabulary, GiB of the KV cache, context, whether it sees images).

    ValueError for a model that cannot be served; no weight is loaded.
    """
    model = read_checked("--model", args.model, args.trust_remote_code)
    shape = shape_of(model, "--model", args.model)
    cache, longest = cache_and_length(
        shape,
        args.max_model_len,
        args.kv_cache_gib,
        width=resolve_dtype(args.dtype).itemsize,
        gpus=args.tensor_parallel,
        tokens=RESPONSE_TOKENS_AT_ONCE,
    )
    sees = sees_images(model.config)
    return model.config.get_text_config().vocab_size, cache, longest, sees


def serve_rollouts(argv: list[str], token: str | None) -> None:
    """Until SIGTERM or SIGINT. ValueError for a user's mistake, before a weight is loaded."""
    args = rollout_arguments(argv)
    http_service.leave_on_signals(_end_children)
    bound = http_service.bind(args.host, args.port, token)
    args.model = fetch("--model", args.model)
    facts = _rollout_facts(args)
    asyncio.run(_serve(args, token, bound, *facts))


async def _serve(
    args: argparse.Namespace,
    token: str | None,
    bound,
    vocab_size: int,
    kv_cache_gib: float,
    max_model_len: int,
    sees: bool,
) -> None:
    """vLLM's engine belongs to the event loop that asks it first."""
    version = 0 if args.serve_initial else None
    engine = PushedEngine(
        args.model,
        version=version,
        dtype=str(resolve_dtype(args.dtype)).removeprefix("torch."),
        max_model_len=max_model_len,
        kv_cache_gib=kv_cache_gib,
        seed=args.seed,
        enforce_eager=args.enforce_eager,
        trust_remote_code=args.trust_remote_code,
        tensor_parallel_size=args.tensor_parallel,
        images_per_prompt=MOST_IMAGES if sees else None,
    )
    async with asyncio.timeout(WARM_UP_SECONDS):
        await engine.warm_up()
    control = Control(
        WeightsGate(version),
        engine,
        args.weights_dir,
        protocol=ROLLOUT,
        token=token,
        max_model_len=max_model_len,
    )
    service = RolloutService(
        engine, control, vocab_size=vocab_size, max_model_len=max_model_len, sees=sees
    )
    app = service.app(token)
    await http_service.serve_app(app, bound, args.name, ROLLOUT_END_SECONDS)


if __name__ == "__main__":
    sys.exit(http_service.run_main(serve_rollouts))
