"""`RolloutServers`: the rollout servers of a run, asked as one.

An answer names the versions of the weights that wrote it.

The pool of `opd/clients/pool.py` balances, retries and fails over. Nothing is believed unchecked: a
text outside the vocabulary, a token without its log-probability or of weights older than allowed
counts as a failure of its server.
"""

import functools
import json
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from opd.clients.health import Limits
from opd.clients.pool import ReplicaPool
from opd.clients.transport import Call
from opd.clients.wire import ABOVE_ZERO, BadAnswer, metric
from opd.config import AsyncConfig, RolloutConfig
from opd.pictures import PromptImages

PROBE_IDS = [2, 3]  # two tokens that every vocabulary has


class Answer(msgspec.Struct):
    """A response, or the beginning of one that a push cut off (`aborted`), which must not be
    trained on.
    """

    token_ids: list[int]
    finish_reason: str
    spans: list[tuple[int, int, int]]  # version, start, end
    logprobs: list[float] | None = None

    @property
    def aborted(self) -> bool:
        return self.finish_reason == "aborted"


@dataclass(slots=True)
class Flow:
    """What happened to the requests of this rank since `take` was last called.

    Called by several threads.
    """

    # tokens of each response that was finished, in their order
    lengths: list[int] = field(default_factory=list)
    idle_s: float = 0.0  # in which no response was being written
    under_way: int = 0
    _since: float = field(default_factory=time.perf_counter)  # of the state as it is
    _taken: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def began(self) -> None:
        self._change(1)

    def ended(self) -> None:
        self._change(-1)

    def take(self) -> tuple[list[int], float]:
        """(lengths, idle share of the time) since the last call."""
        self._change(0)
        with self._lock:
            taken = self.lengths, self.idle_s / (self._since - self._taken)
            self.lengths, self.idle_s, self._taken = [], 0.0, self._since
        return taken

    def _change(self, by: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self.idle_s += 0.0 if self.under_way else now - self._since
            self.under_way, self._since = self.under_way + by, now


class RolloutServers:
    """`submit` starts; `pool` waits, counts and ends."""

    def __init__(
        self,
        urls: Sequence[str],
        cfg: RolloutConfig,
        ahead: AsyncConfig,
        *,
        eos_ids: tuple[int, ...],
        vocab: int,
        token: str | None,
    ):
        self.cfg, self.eos_ids, self.vocab = cfg, eos_ids, vocab
        self.oldest = 0  # version that a server has to have to be in rotation
        self.flow = Flow()
        limits = Limits(
            wait_s=ahead.rollout_wait_s,
            timeout_s=ahead.rollout_timeout_s,
            max_inflight=ahead.max_inflight,
        )
        self.pool = ReplicaPool(
            "rollout",
            urls,
            probe=self._call("probe", PROBE_IDS, 0, 1, 1.0, False, self._read_probe),
            limits=limits,
            api_key=token,
            progress=Call(
                "/metrics", read=functools.partial(metric, name="opd_engine_steps_total")
            ),
        )

    def submit(
        self,
        name: str,
        prompt_ids: list[int],
        *,
        seed: int,
        temperature: float,
        with_logprobs: bool,
        oldest: int,
        most_tokens: int | None = None,
        images: PromptImages | None = None,
    ) -> "Future[Answer]":
        """Asks for one response of tokens no older than version `oldest`.

        The future raises `Unanswered` or `Rejected`.

        It has at most `most_tokens`, or as many as any response.
        """
        read = functools.partial(self._read, with_logprobs=with_logprobs, oldest=oldest)
        most = min(most_tokens or self.cfg.max_response_tokens, self.cfg.max_response_tokens)
        self.flow.began()
        future = self.pool.submit(
            self._call(name, prompt_ids, seed, most, temperature, with_logprobs, read, images)
        )
        future.add_done_callback(lambda _: self.flow.ended())
        return future

    def _call(
        self,
        name: str,
        prompt_ids: list[int],
        seed: int,
        max_tokens: int,
        temperature: float,
        with_logprobs: bool,
        read,
        images: PromptImages | None = None,
    ) -> Call:
        body = {
            "request_id": name,
            "prompt_ids": prompt_ids,
            "seed": seed,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": self.cfg.top_p if temperature else 1.0,
            "top_k": self.cfg.top_k if temperature else 0,
            "stop_ids": list(self.eos_ids),
            "with_logprobs": with_logprobs,
        }
        if images is not None:
            body["images"] = images.to_json()
        return Call(
            "/generate",
            json.dumps(body).encode(),
            request_id=name,
            most_bytes=(1 << 16) + 128 * max_tokens,
            read=read,
            tokens=len(prompt_ids) + max_tokens,
        )

    def _read(self, body: bytes, *, with_logprobs: bool, oldest: int) -> Answer:
        """An answer that can be trained on, or aborted. Raises BadAnswer."""
        try:
            answer = msgspec.json.decode(body, type=Answer)
        except msgspec.MsgspecError as error:
            raise BadAnswer(f"not a response: {error}") from None
        if answer.aborted:
            return answer
        L = len(answer.token_ids)
        if (
            answer.finish_reason not in ("stop", "length")
            or not 1 <= L <= self.cfg.max_response_tokens
        ):
            raise BadAnswer(f"{L} tokens, finished because of {answer.finish_reason!r}")
        if not all(0 <= token < self.vocab for token in answer.token_ids):
            raise BadAnswer(f"a token outside the vocabulary of {self.vocab}")
        if with_logprobs and (
            answer.logprobs is None
            or len(answer.logprobs) != L
            or not all(math.isfinite(x) and x <= ABOVE_ZERO for x in answer.logprobs)
        ):
            raise BadAnswer(f"no finite log-probability for each of the {L} tokens")
        edges = [0, *(end for _, _, end in answer.spans)]
        if (
            not answer.spans
            or [start for _, start, _ in answer.spans] != edges[:-1]
            or edges[-1] != L
        ):
            raise BadAnswer(f"version spans {answer.spans} do not cover {L} tokens")
        if min(version for version, _, _ in answer.spans) < oldest:
            raise BadAnswer(
                f"tokens of version {min(answer.spans)[0]}, older than {oldest}: it missed a push"
            )
        return answer

    def _read_probe(self, body: bytes) -> Answer:
        return self._read(body, with_logprobs=False, oldest=self.oldest)
