"""What the HTTP servers of this package share: who may ask, where they listen, what a mistake is
answered, how they end.

A server listens on the loopback interface, unless OPD_SERVER_TOKEN holds a token; if it does, every
route but `/health` wants `Authorization: Bearer TOKEN`. Every mistake is `{"error": one line}`, and
no more of a body is read than its question may have.
"""

import argparse
import asyncio
import hmac
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from opd.clients.protocols import TOKEN_VARIABLE, is_loopback
from opd.hub_names import as_named
from opd.inputs.arguments import OneLineParser
from opd.log import one_line

SHORTEST_TOKEN = 16
READ_SECONDS = 30.0  # for a client to send a body
LOAD_SECONDS = 1800.0  # for a model to be loaded: a large one from a slow disk
END_SECONDS = 5  # for answers under way when the server is told to end
LINGER_SECONDS, LINGER_BYTES = 1.0, 1 << 16  # for the rest of a body that was refused


def server_parser(module: str, page: str, dtypes: Sequence[str]) -> OneLineParser:
    """The flags that every server has."""
    parser = OneLineParser(f"python -m {module}", page)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"another than loopback needs a token in {TOKEN_VARIABLE}",
    )
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--dtype", choices=["auto", *dtypes], default="auto")
    parser.add_argument(
        "--max_model_len", type=int, help="tokens of prompt and response (default: the model's)"
    )
    parser.add_argument("--trust_remote_code", action="store_true")
    return parser


def check_flags(args: argparse.Namespace, *, at_least_1: Sequence[str]) -> None:
    """ValueError for a number that is none; one that was not given passes."""
    for flag in at_least_1:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1")


def new_app() -> FastAPI:
    """An application without pages of its own, in which every mistake is `{"error": one line}`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(StarletteHTTPException, _as_error)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    return app


class RequireToken:
    """ASGI middleware: 401 for whoever does not know the token, before anything of the body is
    looked at.
    """

    def __init__(self, app: Callable, token: str):
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = JSONResponse(
                    {"error": "wrong or no token"}, 401, headers={"WWW-Authenticate": "Bearer"}
                )
                await (await _closing(Request(scope, receive), refusal))(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _closing(request: Request, response: Response) -> Response:
    """An answer with which the connection ends, once a short rest of the body has come.

    TCP resets a connection that is closed on unread bytes, and the client would see that instead of
    the answer.
    """
    response.headers["Connection"] = "close"
    unheeded = 0
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # the last: it has all been read
        async with asyncio.timeout(LINGER_SECONDS):
            async for block in request.stream():
                unheeded += len(block)
                if unheeded > LINGER_BYTES:
                    break
    return response


class Admission:
    """The questions that a server has admitted, wherever they are: at most so many at a time."""

    def __init__(self, most: int):
        self.most, self.admitted = most, 0

    @contextmanager
    def of_one(self) -> Iterator[None]:
        """Around a question, from its body to its answer. HTTPException 429 if it is one too
        many.
        """
        if self.admitted >= self.most:
            raise HTTPException(
                429, f"{self.admitted} questions wait already", headers={"Retry-After": "1"}
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1


async def read_body(request: Request, most: int) -> bytes:
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


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The object that a body of at most `most` bytes holds."""
    try:
        content = json.loads(await read_body(request, most))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise HTTPException(400, "a body has to be a JSON object")
    return content


async def unless_gone(request: Request, answer: asyncio.Future, seconds: float) -> Any:
    """The result of `answer`; it is cancelled if the client goes first (ClientDisconnect) or the
    time is over (TimeoutError).

    The body has to be read: after it there is one message more, that the client has gone.
    """
    gone = asyncio.ensure_future(request.receive())
    try:
        async with asyncio.timeout(seconds):
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return await answer
    finally:
        answer.cancel()
        gone.cancel()


def metrics_text(counters: dict[str, int], gauges: dict[str, int]) -> Response:
    """Prometheus' text form of `opd_NAME_total` and `opd_NAME`; `wire.metric` reads it."""
    lines = [
        f"# TYPE opd_{name}_total counter\nopd_{name}_total {value}\n"
        for name, value in counters.items()
    ]
    lines += [f"# TYPE opd_{name} gauge\nopd_{name} {value}\n" for name, value in gauges.items()]
    return PlainTextResponse("".join(lines))


async def _bad_query(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    return await _closing(
        request, JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)
    )


async def _as_error(request: Request, error: StarletteHTTPException) -> Response:
    answer = JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    return await _closing(request, answer)


async def _nobody_listens(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


def read_token() -> str | None:
    """The token of OPD_SERVER_TOKEN, None without one. ValueError for one that could be guessed."""
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ValueError(
            f"{TOKEN_VARIABLE}: {len(token)} characters; take at least {SHORTEST_TOKEN}, or unset "
            "it"
        )
    return token


def check_host(host: str, token: str | None) -> None:
    """ValueError for a host that others reach, unless they need a token."""
    if not is_loopback(host) and token is None:
        raise ValueError(
            f"--host {host}: other machines would reach a server that asks for no token; put one "
            f"of at least {SHORTEST_TOKEN} characters into {TOKEN_VARIABLE}, or listen on "
            "127.0.0.1 and use a tunnel (ssh -L)"
        )


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until the engine stands.

    ValueError as `check_host`, or for an address that cannot be had.
    """
    check_host(host, token)
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {one_line(error)}") from None
    return bound


def leave_on_signals(before: Callable[[], None] = lambda: None) -> None:
    """SIGTERM and SIGINT call `before` and end the process with status 0, whatever it does.

    Nothing is left to save, and an engine that loads or computes would keep the interpreter
    waiting.
    """

    def leave(signum, frame) -> None:
        before()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)


async def serve_app(
    app: Callable, bound: socket.socket, name: str, end_seconds: int = END_SECONDS
) -> None:
    """Listens, says where, and serves until SIGTERM or SIGINT; at its end uvicorn raises the signal
    again.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=end_seconds,
    )
    bound.listen()
    host, port = bound.getsockname()[:2]
    print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await uvicorn.Server(config).serve(sockets=[bound])


def run_main(serve: Callable[[list[str], str | None], None]) -> int:
    """`serve(argv, token)` as a program. Exit status 2 for a mistake, 0 after a signal."""
    try:
        serve(sys.argv[1:], read_token())
    except ValueError as error:
        print(f"error: {as_named(one_line(error))}", file=sys.stderr)
        return 2
    return 0
