"""One HTTP request: what is asked, how long and how much is waited for, and what can become of it.

An answer's body is read up to a bound and a deadline that the caller sets, whatever its headers
promise. Redirects are not followed and the environment's proxies not used: a request goes where its
URL says. Compressed bodies are not asked for.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from opd.clients.wire import BadAnswer

LONGEST_RETRY_AFTER_S = 10.0
ERROR_BYTES = 1 << 12  # of the text of an error
# of an answer: to read 8 MB of JSON takes half a second, and everybody else's clock runs on
LARGE_BYTES = 1 << 18
KEEPALIVE_S = (
    3.0  # uvicorn closes an idle connection after 5 s: not to send a request while it does
)


@dataclass(frozen=True, slots=True)
class Call:
    """One request, the same at whichever replica.

    `read` turns the body of the answer into a value, or raises BadAnswer.
    """

    path: str
    body: bytes | None = None  # None is a GET
    content_type: str = "application/json"
    request_id: str = ""  # the same at every attempt: whoever answers, it is the same question
    most_bytes: int = 1 << 20  # of an answer's body; a longer one is not read
    read: Callable[[bytes], Any] = bytes
    tokens: int = 0  # for the statistics


class Rejected(RuntimeError):
    """A server understood the request and refuses it (4xx): no other replica will
    answer it either.
    """


class Unanswered(RuntimeError):
    """No replica answered in time; names the pool, every URL and its last error."""


# Nobody listens; the connection broke; 429; 5xx or a redirect; no answer in time; an answer that
# `Call.read` does not believe.
FailureKind = Literal["refused", "connection", "busy", "status", "timeout", "answer"]


class Failure(Exception):
    """One attempt failed, which another one may not."""

    def __init__(self, kind: FailureKind, text: str, retry_after: float = 0.0):
        super().__init__(text)
        self.kind, self.retry_after = kind, retry_after


class Transport:
    """A pool of at most `connections` connections, for one event loop.

    The key is sent as a bearer token.
    """

    def __init__(self, connections: int, connect_s: float, api_key: str | None = None):
        self._key = api_key
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=KEEPALIVE_S,
            ),
        )
        # starts with the first large one
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._received = 0

    async def ask(self, url: str, call: Call, timeout_s: float) -> Any:
        """What `call.read` makes of the answer. Raises Failure or Rejected."""
        return await self.read(call, await self.send(url, call, asyncio.timeout(timeout_s)))

    async def read(self, call: Call, body: bytes) -> Any:
        """What `call.read` makes of a body; a large one is read beside the event loop."""
        try:
            if len(body) < LARGE_BYTES:
                return call.read(body)
            return await asyncio.get_running_loop().run_in_executor(self._reader, call.read, body)
        except BadAnswer as error:
            raise Failure("answer", str(error)) from None

    async def send(self, url: str, call: Call, deadline: asyncio.Timeout) -> bytes:
        """The body of a 200. Raises Failure or Rejected.

        `deadline` may be moved meanwhile. Nothing else should end this: httpcore 1.0 does not close
        a connection whose request is cancelled a second time while it is closing it.
        """
        seconds = deadline.when() - asyncio.get_running_loop().time()
        headers = {"X-Request-Id": call.request_id} if call.request_id else {}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        method = "GET" if call.body is None else "POST"
        try:
            async with (
                deadline,
                self._client.stream(
                    method, url + call.path, content=call.body, headers=headers
                ) as response,
            ):
                body = await _read_body(response, call.most_bytes)
        except TimeoutError:
            raise Failure("timeout", f"no answer within {round(seconds, 1):g} s") from None
        except (httpx.ConnectTimeout, httpx.ConnectError) as error:
            raise Failure(
                "refused", f"cannot connect: {str(error) or type(error).__name__}"
            ) from None
        except httpx.HTTPError as error:
            raise Failure(
                "connection", f"the connection broke: {str(error) or type(error).__name__}"
            ) from None
        self._received += len(body)
        if response.status_code == 200:
            return body
        text = f"HTTP {response.status_code}: {self._quoted(body)}"
        if response.status_code == 429:
            raise Failure("busy", text, _retry_after(response.headers.get("Retry-After", "")))
        if 400 <= response.status_code < 500:
            raise Rejected(f"{url}{call.path.partition('?')[0]}: {text}")
        raise Failure("status", text)

    def _quoted(self, body: bytes) -> str:
        """The beginning of an error's text, on one line.

        Some servers repeat the key that they refuse.
        """
        text = body.decode(errors="replace")
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:300]

    def take_bytes(self) -> int:
        """Bytes of the bodies received since the last call."""
        taken, self._received = self._received, 0
        return taken

    async def close(self) -> None:
        """Closes every connection."""
        self._reader.shutdown(cancel_futures=True)
        await self._client.aclose()


async def _read_body(response: httpx.Response, most: int) -> bytes:
    """All of an answer; of an error the beginning, since its status says what to do."""
    is_answer = response.status_code == 200
    promised = response.headers.get("Content-Length", "")
    if is_answer and promised.isdecimal() and int(promised[:20]) > most:
        raise Failure("answer", f"a body of {promised[:20]} bytes, more than {most}")
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if not is_answer and len(body) >= ERROR_BYTES:
            return bytes(body[:ERROR_BYTES])
        if len(body) > most:
            raise Failure("answer", f"a body of more than {most} bytes")
    return bytes(body)


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header; its other form, a date, counts as 1 s."""
    try:
        seconds = float(value)
    except ValueError:
        return 1.0
    # "nan" is a float to Python
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if seconds == seconds else 1.0
