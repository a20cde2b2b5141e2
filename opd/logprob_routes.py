"""The routes of `opd.logprob_server`: questions pass the gate, and a pause lets what is behind it be answered first."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response

from opd.http_service import RequireToken, metrics_text, new_app, read_body
from opd.logprob_engine import VersionedBody
from opd.logprob_wire import VERSION_HEADER, LogprobQuestion
from opd.messages import one_line
from opd.scoring import ScoringThread
from opd.scoring_routes import answer_or_give_up, binary
from opd.server_control import ACT_SECONDS, Control, PauseMode
from opd.weight_offer import Offer
from opd.wire import decode_ids


class EngineHolder:
    """`server_control.Holder` of an engine whose thread does everything in order.

    Whatever is in its queue when the gate closes is answered by the old weights, in either mode: a forward takes no longer
    than its end would.
    """

    def __init__(self, engine: ScoringThread):
        self.engine = engine

    async def pause(self, mode: PauseMode) -> None:
        """Returns when every question that passed the gate has its answer."""
        await self._in_turn(lambda scorer: None)

    async def load(self, source: Path | Offer, version: int) -> None:
        """There are no caches to reset."""
        await self._in_turn(lambda scorer: scorer.load(source, version))

    async def resume(self) -> None:
        """Nothing was kept."""

    async def _in_turn(self, act: Callable[[Any], Any]) -> None:
        async with asyncio.timeout(ACT_SECONDS):
            await asyncio.wrap_future(self.engine.do(act))


class Service:
    """The routes of one model."""

    def __init__(self, engine: ScoringThread, control: Control, *, max_model_len: int, max_waiting: int):
        self.engine, self.control, self.max_model_len, self.max_waiting = engine, control, max_model_len, max_waiting
        self.vocab_size = engine.ready.result(timeout=0).vocab_size  # whoever serves has waited for it
        self.admitted = 0  # questions without an answer yet, wherever they are

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
        gauges = {"waiting": self.admitted, "weights_version": version, "paused": int(gate.state == "paused")}
        return metrics_text(counts, gauges)

    async def logprobs(self, request: Request, prompt_length: int, temperature: float = 1.0) -> Response:
        if self.admitted >= self.max_waiting:
            raise HTTPException(429, f"{self.admitted} questions wait already", headers={"Retry-After": "1"})
        self.admitted += 1
        try:
            body = await read_body(request, 4 * self.max_model_len)
            try:
                question = self._question(body, prompt_length, temperature)
            except ValueError as error:
                raise HTTPException(400, one_line(error)) from None
            await self.control.ready()
            # Nothing is awaited between the gate and the queue: a pause comes before both or after both.
            return await answer_or_give_up(request, self.engine.submit(question), _respond)
        finally:
            self.admitted -= 1

    def _question(self, body: bytes, prompt_length: int, temperature: float) -> LogprobQuestion:
        """Raises ValueError for what cannot be answered."""
        ids = decode_ids(body, vocab=self.vocab_size, most=self.max_model_len)
        if not 1 <= prompt_length <= len(ids):
            raise ValueError(f"prompt_length={prompt_length}: must be 1 to the number of token ids, {len(ids)}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature}: must be above 0 and finite")
        return LogprobQuestion(ids[:prompt_length], ids[prompt_length:], temperature)


def _respond(answer: VersionedBody) -> Response:
    response = binary(answer.body)
    response.headers[VERSION_HEADER] = str(answer.version)
    return response
