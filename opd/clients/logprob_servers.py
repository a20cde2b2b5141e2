"""`LogprobServers`: the log-prob servers of a run, asked as one.

An answer names the version of the weights that gave it.

The pool of `opd/clients/pool.py` balances, retries and fails over. A replica whose weights are
being changed answers late and not badly: its own metrics excuse it. One that has no whole weights
answers 503, is out of the rotation, and comes back with the probe that follows a complete push.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from opd.clients.health import Limits
from opd.clients.pool import ReplicaPool
from opd.clients.transport import Call
from opd.clients.wire import BadAnswer, LogprobQuestion, Logprobs, decode_logprobs, metric
from opd.types import Rollout

LOGPROB_PROBE = LogprobQuestion([2], [3])  # one token: the engine has to compute it


class LogprobServers:
    """`submit` starts; `pool` waits, counts and ends."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None,
        limits: Limits | None = None,
        *,
        temperature: float = 1.0,
    ):
        self.temperature = temperature
        self.oldest = 0  # version that a server has to have to be in rotation
        self.pool = ReplicaPool(
            "log-prob servers",
            urls,
            probe=_call(LOGPROB_PROBE, read=self._read_probe),
            progress=Call("/metrics", read=_progress),
            api_key=token,
            limits=limits,
        )

    def submit(self, rollout: Rollout, *, oldest: int = 0) -> "Future[Logprobs]":
        """Asks what weights of at least version `oldest` say of a response: log-probabilities and
        entropies, [L] each.

        The future raises `transport.Unanswered` or `Rejected`; an answer that no model gives is
        asked for again elsewhere.
        """
        prompt = rollout.prompt
        question = LogprobQuestion(
            prompt.token_ids, rollout.response_ids, self.temperature, prompt.images
        )
        read = functools.partial(_read_answer, question=question, oldest=oldest)
        return self.pool.submit(
            _call(question, read, f"logprobs-{rollout.sample_id.replace('/', '-')}")
        )

    def _read_probe(self, body: bytes) -> Logprobs:
        return _read_answer(body, LOGPROB_PROBE, self.oldest)


def _call(
    question: LogprobQuestion, read: Callable[[bytes], Logprobs], request_id: str = ""
) -> Call:
    return Call(
        question.path,
        question.body,
        content_type="application/octet-stream",
        request_id=request_id,
        most_bytes=question.most_bytes,
        read=read,
        tokens=question.num_tokens,
    )


def _read_answer(body: bytes, question: LogprobQuestion, oldest: int) -> Logprobs:
    """Raises BadAnswer, also for weights that missed a push."""
    found = decode_logprobs(body, question)
    if found.version < oldest:
        raise BadAnswer(
            f"weights of version {found.version}, older than {oldest}: it missed a push"
        )
    return found


def _progress(body: bytes) -> float:
    """A number that grows while the engine moves: its batches; or the clock, while a trainer holds
    it.
    """
    return metric(body, "opd_batches_total") + (
        time.monotonic() if metric(body, "opd_paused") else 0.0
    )
