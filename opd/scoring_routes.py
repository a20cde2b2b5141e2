"""The routes of `opd.scoring_server`: what a question may look like, who may ask it, and what is answered to a mistake."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from opd.http_service import RequireToken, metrics_text, new_app, read_body, read_json, unless_gone
from opd.messages import one_line
from opd.protocols import SCORING
from opd.scoring import ScoringThread
from opd.types import TeacherPayload
from opd.wire import Question, decode_ids, stream_arrays

ANSWER_SECONDS = 600.0  # for the engine to compute; clients have shorter deadlines of their own
BYTES_PER_TOKEN_OF_TEXT = 16  # of a text to be tokenized; more is longer than the context
BINARY = "application/octet-stream"
LEAST_TEMPERATURE = 1e-3  # below, logits overflow


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server says about itself."""

    name: str
    model: str
    content: str  # its hash
    eos_ids: tuple[int, ...]
    max_model_len: int
    max_support_k: int


class Service:
    """The routes of one model."""

    def __init__(self, served: ModelInfo, engine: ScoringThread, tokenizer, *, max_waiting: int):
        self.served, self.engine, self.tokenizer, self.max_waiting = served, engine, tokenizer, max_waiting
        self.scorer = engine.ready.result(timeout=0)  # whoever serves has waited for it
        self.admitted = 0  # questions whose body is being read or whose answer is due

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
        entry = {"id": served.name, "object": "model", "root": served.model, "max_model_len": served.max_model_len}
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
        }

    async def metrics(self) -> Response:
        engine = self.engine
        counts = {"requests": engine.requests, "tokens": engine.tokens, "batches": engine.batches}
        return metrics_text(counts, {"waiting": engine.waiting})

    async def head(self) -> Response:
        head = self.scorer.head
        arrays = {"weight_VH": head.weight_VH} | ({} if head.bias_V is None else {"bias_V": head.bias_V})
        length, blocks = stream_arrays(arrays)
        return StreamingResponse(blocks, media_type=BINARY, headers={"Content-Length": str(length)})

    async def tokenize(self, request: Request) -> dict[str, list[int]]:
        content = await read_json(request, BYTES_PER_TOKEN_OF_TEXT * self.served.max_model_len)
        text, special = content.get("prompt"), content.get("add_special_tokens", False)
        if not isinstance(text, str) or not isinstance(special, bool):
            raise HTTPException(400, 'expected {"prompt": text, "add_special_tokens": true or false}')
        encode = functools.partial(self.tokenizer.encode, text, add_special_tokens=special)
        try:
            return {"tokens": await asyncio.to_thread(encode)}
        except (ValueError, TypeError) as error:  # half of a surrogate pair, for one
            raise HTTPException(400, f"not a text: {one_line(error)}") from None

    async def score(
        self, request: Request, prompt_length: int, payload: TeacherPayload, support_k: int = 0,
        temperature: float = 1.0, vocab: int | None = None,
    ) -> Response:  # fmt: skip
        if self.admitted >= self.max_waiting:
            raise HTTPException(429, f"{self.admitted} questions wait already", headers={"Retry-After": "1"})
        self.admitted += 1
        try:
            body = await read_body(request, 4 * self.served.max_model_len)
            try:
                question = self._question(body, prompt_length, payload, support_k, temperature, vocab)
            except ValueError as error:
                raise HTTPException(400, one_line(error)) from None
            return await answer_or_give_up(request, self.engine.submit(question))
        finally:
            self.admitted -= 1

    def _question(
        self, body: bytes, prompt_length: int, payload: TeacherPayload, support_k: int, temperature: float, vocab: int | None
    ) -> Question:  # fmt: skip
        """Raises ValueError for what cannot be answered."""
        size, hidden_size = self.scorer.head.weight_VH.shape
        ids = decode_ids(body, vocab=size, most=self.served.max_model_len)
        vocab = size if vocab is None else vocab
        if not 1 <= vocab <= size:
            raise ValueError(f"vocab={vocab}: must be 1 to {size}")
        if not 1 <= prompt_length <= len(ids):
            raise ValueError(f"prompt_length={prompt_length}: must be 1 to the number of token ids, {len(ids)}")
        if not LEAST_TEMPERATURE <= temperature <= 1 / LEAST_TEMPERATURE:
            raise ValueError(f"temperature={temperature}: must be {LEAST_TEMPERATURE:g} to {1 / LEAST_TEMPERATURE:g}")
        most = min(vocab, self.served.max_support_k)
        if "topk" in payload and not 1 <= support_k <= most:
            raise ValueError(f"support_k={support_k}: must be 1 to {most}")
        if "topk" not in payload and support_k:
            raise ValueError(f"support_k={support_k}: payload {payload} has no support; leave it out")
        response_ids = ids[prompt_length:]
        if response_ids and max(response_ids) >= vocab:
            raise ValueError(f"response token {max(response_ids)} is outside the {vocab} tokens of vocab")
        return Question(ids[:prompt_length], response_ids, payload, support_k, vocab, temperature, hidden_size)


def binary(body: bytes) -> Response:
    """Raw arrays."""
    return Response(body, media_type=BINARY)


async def answer_or_give_up(request: Request, answer: Future, respond: Callable[[Any], Response] = binary) -> Response:
    """What `respond` makes of the answer. A question whose client has gone is taken back."""
    try:
        return respond(await unless_gone(request, asyncio.wrap_future(answer), ANSWER_SECONDS))
    except TimeoutError:
        return JSONResponse({"error": f"no answer within {ANSWER_SECONDS:g} s"}, 503)
    except ClientDisconnect:
        raise
    except Exception as error:  # the engine thread has printed it; the client hears it too
        return JSONResponse({"error": f"{type(error).__name__}: {one_line(error)}"}, 500)
