"""The routes of `opd.scoring_server`: what a question may look like, who may ask it, and what is answered to a mistake.

Every mistake is `{"error": one line}`. No more of a body is read than the longest question may have.
"""

import asyncio
import functools
import hmac
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from opd.rows import one_line
from opd.scoring import ScoringThread
from opd.types import TeacherPayload
from opd.wire import Question, decode_ids, stream_arrays

PROTOCOL = "opd-scoring-1"
READ_SECONDS = 30.0  # for a client to send a body
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
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        for path in ("health", "version", "info", "metrics", "head"):
            app.add_api_route(f"/{path}", getattr(self, path), methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/score", self.score, methods=["POST"])
        app.add_exception_handler(RequestValidationError, _bad_query)
        app.add_exception_handler(StarletteHTTPException, _as_error)
        app.add_exception_handler(ClientDisconnect, _nobody_listens)
        return app if token is None else RequireToken(app, token)

    async def health(self) -> Response:
        return Response()

    async def version(self) -> dict[str, str]:
        return {"version": "1", "protocol": PROTOCOL}

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
        lines = [f"# TYPE opd_{name}_total counter\nopd_{name}_total {count}\n" for name, count in counts.items()]
        return PlainTextResponse("".join(lines) + f"# TYPE opd_waiting gauge\nopd_waiting {engine.waiting}\n")

    async def head(self) -> Response:
        head = self.scorer.head
        arrays = {"weight_VH": head.weight_VH} | ({} if head.bias_V is None else {"bias_V": head.bias_V})
        length, blocks = stream_arrays(arrays)
        return StreamingResponse(blocks, media_type=BINARY, headers={"Content-Length": str(length)})

    async def tokenize(self, request: Request) -> dict[str, list[int]]:
        await _read_body(request, BYTES_PER_TOKEN_OF_TEXT * self.served.max_model_len)
        try:
            content = await request.json()
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"not JSON: {one_line(error)}") from None
        text = content.get("prompt") if isinstance(content, dict) else None
        special = isinstance(content, dict) and content.get("add_special_tokens", False)
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
            body = await _read_body(request, 4 * self.served.max_model_len)
            try:
                question = self._question(body, prompt_length, payload, support_k, temperature, vocab)
            except ValueError as error:
                raise HTTPException(400, one_line(error)) from None
            return await _answer_or_give_up(request, self.engine.submit(question))
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


class RequireToken:
    """ASGI middleware: 401 for whoever does not know the token, before a byte of the body is read."""

    def __init__(self, app: Callable, token: str):
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = JSONResponse({"error": "wrong or no token"}, 401, headers={"WWW-Authenticate": "Bearer"})
                await _closing(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _closing(response: Response) -> Response:
    """The connection ends with it: what the client still sends is not read."""
    response.headers["Connection"] = "close"
    return response


async def _read_body(request: Request, most: int) -> bytes:
    """The body, of which no more than `most` bytes are ever held, whatever its headers say."""
    too_long = HTTPException(413, f"a body may have {most} bytes")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"no whole body within {READ_SECONDS:g} s") from None
    request._body = bytes(body)  # where `request.json` looks
    return request._body


async def _answer_or_give_up(request: Request, answer: Future) -> Response:
    """The answer as a response. A question whose client has gone is taken back."""
    scored = asyncio.wrap_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body there is one message more: the client has gone
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await asyncio.wait({scored, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():
                raise ClientDisconnect
            return Response(await scored, media_type=BINARY)
    except TimeoutError:
        return JSONResponse({"error": f"no answer within {ANSWER_SECONDS:g} s"}, 503)
    except ClientDisconnect:
        raise
    except Exception as error:  # the engine thread has printed it; the client hears it too
        return JSONResponse({"error": f"{type(error).__name__}: {one_line(error)}"}, 500)
    finally:
        scored.cancel()
        gone.cancel()


async def _bad_query(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return _closing(JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400))


async def _as_error(request: Request, error: StarletteHTTPException) -> Response:
    """A body that was refused may still be on its way."""
    return _closing(JSONResponse({"error": error.detail}, error.status_code, headers=error.headers))


async def _nobody_listens(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)
