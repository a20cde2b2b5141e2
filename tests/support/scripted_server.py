"""A rollout and log-prob server in a thread, which does what a test has written down."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from opd.clients.wire import LogprobQuestion, encode_logprobs
from opd.types import Prompt

EOS, VOCAB, P, G = 1, 50, 3, 2
DEADLINE_S = 60


@dataclass
class Scripted:
    """What the server does with requests; `log` has (request id, version) in the order of the
    answers.
    """

    version: int = 0
    delays: dict[str, float] = field(default_factory=dict)
    # request id -> what its first answer has instead
    first_answers: dict[str, dict] = field(default_factory=dict)
    log: list[tuple[str, int]] = field(default_factory=list)
    bodies: dict[str, dict] = field(default_factory=dict)
    # of a response
    length: Callable[[random.Random, int], int] = lambda rng, most: rng.randint(1, most)
    seconds_per_token: float = 0.0
    lengths: list[int] = field(default_factory=list)  # in the order of the answers
    # whose log-probabilities were asked for, in their order
    judged: list[str] = field(default_factory=list)
    # request id -> how many versions its first answer is behind
    late: dict[str, int] = field(default_factory=dict)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/generate")
        async def generate(request: Request):
            body = await request.json()
            name, version = body["request_id"], self.version
            if name != "probe":
                self.bodies[name] = body
            rng = random.Random(body["seed"])
            L = self.length(rng, body["max_tokens"])
            if name != "probe":
                await asyncio.sleep(self.delays.get(name, 0) + self.seconds_per_token * L)
                self.log.append((name, version))
                self.lengths.append(L)
            tokens = [rng.randrange(2, VOCAB) for _ in range(L)]
            answer = {
                "token_ids": tokens,
                "finish_reason": "length",
                "spans": [[version, 0, L]],
                "logprobs": [-0.5] * L if body["with_logprobs"] else None,
            }
            return JSONResponse(answer | self.first_answers.pop(name, {}))

        @app.post("/logprobs")
        async def logprobs(request: Request, prompt_length: int):
            """Token t of a response has log-probability -t - 1 and entropy t."""
            ids = torch.frombuffer(bytearray(await request.body()), dtype=torch.int32).tolist()
            name, L = request.headers.get("x-request-id", ""), len(ids) - prompt_length
            if name:
                self.judged.append(name.removeprefix("logprobs-"))
            late = self.late.pop(name, 0)
            arrays = {"logprobs": -torch.arange(1.0, L + 1), "entropy": torch.arange(0.0, L)}
            question = LogprobQuestion(ids[:prompt_length], ids[prompt_length:])
            return Response(
                encode_logprobs(arrays, question, self.version - late),
                media_type="application/octet-stream",
            )

        return app


@contextmanager
def serving(script: Scripted):
    """`script` behind a port of the loopback interface; its `url` says which."""
    where = {
        "host": "127.0.0.1",
        "port": getattr(script, "port", 0),
        "log_level": "error",
        "lifespan": "off",
    }
    running = uvicorn.Server(uvicorn.Config(script.app(), timeout_graceful_shutdown=1, **where))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    script.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield script
    running.should_exit = True
    thread.join(timeout=DEADLINE_S)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def prompts_of(step: int) -> list[Prompt]:
    return [Prompt(prompt_id=10 * step + i, domain="d", token_ids=[2, 3 + i]) for i in range(P)]


def ids_of(steps: range) -> list[str]:
    return [f"{step}/{place}/{g}" for step in steps for place in range(P) for g in range(G)]
