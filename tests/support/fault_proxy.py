"""A small HTTP/1.1 server in a thread of its own, on a loopback port, that can be told at any time
to do wrong.

`HttpServer` answers by a coroutine that a test gives; `FaultProxy` hands requests on to a real
server. Both take a `Fault`, and both count. As a script it is a server in a process that a test can
stop or kill: `python fault_proxy.py SECONDS_PER_ANSWER`.
"""

import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import httpx

DEADLINE_S = 300.0


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without the query
    headers: dict[str, str]  # lower-case names
    body: bytes
    query: str = ""


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong, for which requests, and how often."""

    kind: str  # a key of FAULTS
    only: Callable[[Request], bool] = lambda request: True
    first: float = float("inf")  # so many requests, then none
    seconds: float = 0.0  # of a delay
    location: str = ""  # of a redirect
    struck: int = 0  # how often it did


def is_scoring(request: Request) -> bool:
    """A trainer's request, not a probe: those have no id."""
    return "x-request-id" in request.headers


# ---- What can go wrong: (fault, connection, the answer that would be right) ----------------------


def _status(status: int, **headers: str):
    async def fault(fault: Fault, connection: "_Connection", answer: Answer) -> None:
        await connection.send(
            Answer(status, b'{"error": "no"}', {k.replace("_", "-"): v for k, v in headers.items()})
        )

    return fault


def _changed(change: Callable[[dict], None]):
    """A completion whose JSON is whole and whose content is wrong."""

    async def fault(fault: Fault, connection: "_Connection", answer: Answer) -> None:
        content = json.loads(answer.body)
        change(content["choices"][0])
        await connection.send(replace(answer, body=json.dumps(content).encode()))

    return fault


def _last_row(choice: dict) -> dict:
    return choice["prompt_logprobs"][-1]


def _set_logprob(value: float | None):
    def change(choice: dict) -> None:
        for entry in _last_row(choice).values():
            entry["logprob"] = value

    return change


def _fewer(choice: dict) -> None:
    """As a server whose --max-logprobs is 4 and that does not refuse."""
    for row in filter(None, choice["prompt_logprobs"]):
        for id_ in [id_ for id_, entry in row.items() if entry["rank"] > 4]:
            del row[id_]


def _outside(choice: dict) -> None:
    """Another id where none was sampled, or another for all."""
    row = _last_row(choice)
    worst = max(row, key=lambda id_: row[id_]["rank"])
    row["1000000"] = row.pop(worst)


async def _reset(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    connection.write_head(answer, len(answer.body))
    connection.writer.write(answer.body[: len(answer.body) // 2])
    await connection.writer.drain()
    connection.reset()


async def _cut_connection(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    connection.write_head(answer, len(answer.body))
    connection.writer.write(answer.body[: len(answer.body) // 2])
    await connection.writer.drain()
    connection.writer.close()


async def _cut_json(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    await connection.send(replace(answer, body=answer.body[: len(answer.body) // 2]))


async def _hang(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    await asyncio.sleep(DEADLINE_S)


async def _delay(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    await asyncio.sleep(fault.seconds)
    await connection.send(answer)


async def _slow_loris(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    connection.write_head(answer, len(answer.body))
    for place in range(len(answer.body)):
        connection.writer.write(answer.body[place : place + 1])
        await asyncio.sleep(1.0)


async def _ten_gigabytes(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    connection.write_head(answer, 10 << 30)
    connection.writer.write(answer.body)
    await asyncio.sleep(DEADLINE_S)


async def _endless(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    connection.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    block = b" " * (1 << 16)
    while True:
        connection.writer.write(b"%x\r\n%b\r\n" % (len(block), block))
        await connection.writer.drain()


async def _redirect(fault: Fault, connection: "_Connection", answer: Answer) -> None:
    await connection.send(Answer(307, b"", {"Location": fault.location}))


FAULTS = {
    "500": _status(500),
    "503": _status(503),
    "429": _status(429, Retry_After="1"),
    "reset": _reset,
    "cut_connection": _cut_connection,
    "cut_json": _cut_json,
    "hang": _hang,
    "delay": _delay,
    "slow_loris": _slow_loris,
    "short": _changed(lambda choice: choice["prompt_logprobs"].pop()),
    "nan": _changed(_set_logprob(float("nan"))),
    "null": _changed(_set_logprob(None)),
    "clamped": _changed(_set_logprob(-9999.0)),
    "outside": _changed(_outside),
    "positive": _changed(_set_logprob(0.7)),
    "ten_gigabytes": _ten_gigabytes,
    "endless": _endless,
    "redirect": _redirect,
    "limit_4": _changed(_fewer),
}
NEEDS_NO_ANSWER = {
    "500",
    "503",
    "429",
    "hang",
    "endless",
    "redirect",
}  # the real server is not bothered


# ---- Server --------------------------------------------------------------------------------------


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def next_request(self) -> Request:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {
            k.strip().lower(): v.strip()
            for k, _, v in (line.partition(":") for line in head[1:] if line)
        }
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        path, _, query = target.partition("?")
        return Request(method, path, headers, body, query)

    def write_head(self, answer: Answer, length: int) -> None:
        lines = [f"HTTP/1.1 {answer.status} Some-Reason", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    async def send(self, answer: Answer) -> None:
        self.write_head(answer, len(answer.body))
        self.writer.write(answer.body)
        await self.writer.drain()

    async def gone(self) -> None:
        """Returns when the client has left."""
        while not (self.reader.at_eof() or self.reader.exception()):
            await asyncio.sleep(0.02)

    def reset(self) -> None:
        """RST instead of FIN."""
        with contextlib.suppress(OSError):  # it is closed already
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self.writer.transport.abort()


class HttpServer:
    """Answers each request by `answer`.

    A client that leaves before its answer cancels it, and is counted in `left`.
    """

    def __init__(self, answer: Callable[[Request], Awaitable[Answer]]):
        self.answer = answer
        self.fault: Fault | None = None
        self.requests: list[Request] = []
        self.times: list[tuple[str, float]] = []  # path, when it came
        self.counts: Counter = Counter()  # path -> requests
        self.inflight, self.most_inflight, self.left = 0, 0, 0  # of those with an id
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listens, on the same port as before."""
        self._do(self._open())

    def refuse(self) -> None:
        """As if its process had died: nobody listens, and every connection is reset."""
        self._do(self._refuse())

    def break_connections(self) -> None:
        """Resets what is under way, and goes on listening."""
        self._do(self._break_connections())

    def close(self) -> None:
        self.refuse()
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _do(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        self._server.close()
        await self._break_connections()

    async def _break_connections(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer)
        self._connections.add(connection)
        try:
            with contextlib.suppress(
                asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
            ):
                while not writer.is_closing():
                    await self._handle(connection, await connection.next_request())
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _handle(self, connection: _Connection, request: Request) -> None:
        self.requests.append(request)
        self.times.append((request.path, time.monotonic()))
        self.counts[request.path] += 1
        counted = is_scoring(request)
        self.inflight += counted
        self.most_inflight = max(self.most_inflight, self.inflight)
        work = asyncio.ensure_future(self._work(connection, request))
        gone = asyncio.ensure_future(connection.gone())
        try:
            await asyncio.wait({work, gone}, return_when="FIRST_COMPLETED")
            if not work.done():
                self.left += counted
                raise ConnectionError
            work.result()
        finally:
            work.cancel()
            gone.cancel()
            self.inflight -= counted

    async def _work(self, connection: _Connection, request: Request) -> None:
        fault = self.fault
        if fault is None or fault.struck >= fault.first or not fault.only(request):
            await connection.send(await self.answer(request))
            return
        fault.struck += 1
        answer = Answer() if fault.kind in NEEDS_NO_ANSWER else await self.answer(request)
        await FAULTS[fault.kind](fault, connection, answer)


class FaultProxy(HttpServer):
    """In front of a real server. `rewrite` is what to put for what, in requests and in answers."""

    def __init__(self, upstream: str):
        self._client = httpx.AsyncClient(
            trust_env=False, timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None)
        )
        self.upstream, self.rewrite = upstream, dict[bytes, bytes]()
        super().__init__(self._forward)

    async def _forward(self, request: Request) -> Answer:
        kept = {
            k: v
            for k, v in request.headers.items()
            if k in ("content-type", "x-request-id", "authorization")
        }
        target = f"{self.upstream}{request.path}" + (f"?{request.query}" if request.query else "")
        body = self._rewritten(request.body)
        response = await self._client.request(
            request.method, target, content=body or None, headers=kept
        )
        return Answer(response.status_code, self._rewritten(response.content))

    def _rewritten(self, body: bytes) -> bytes:
        for old, new in self.rewrite.items():
            body = body.replace(old, new)
        return body

    async def _end(self) -> None:
        await super()._end()
        await self._client.aclose()


if __name__ == "__main__":

    async def echo(request: Request) -> Answer:
        await asyncio.sleep(float(sys.argv[1]))
        return Answer(body=request.body)

    with HttpServer(echo) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until whoever started it is gone
