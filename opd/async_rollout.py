"""Rollouts from servers, begun before they are asked for. It stands where the colocated rollout engine stands in the loop.

Order, not luck: step s trains on the same prompts, places and seeds as in the synchronous trainer, and its samples are issued as
soon as the version v of the pushed weights reaches s - max_staleness. Hence

* a sample is never staler than the bound, because it was issued within it, and no finished sample is ever dropped;
* long responses are not discriminated against: a step waits for all of its own, while later steps are being written;
* with `max_staleness` 0 nothing runs ahead, and the run is the synchronous one.

Each rank issues its own share of the samples, to the same servers. Rank 0 pushes the weights.
"""

import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from opd import distributed
from opd.config import AsyncConfig, RolloutConfig
from opd.faults import fault_point
from opd.replica import Limits
from opd.rollout import places_of, sample_id_of, sample_seed
from opd.servers import ReplicaPool
from opd.transport import Call
from opd.types import Prompt, Rollout
from opd.wire import ABOVE_ZERO, BadAnswer, metric

Push = Callable[[Iterable[tuple[str, Tensor]], int], dict[str, float]]  # (parameters, version) -> metrics; collective


class _Answer(msgspec.Struct):
    token_ids: list[int]
    finish_reason: str
    spans: list[tuple[int, int, int]]  # version, start, end
    logprobs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sample belongs."""

    step: int
    prompt: Prompt
    place: int
    generation: int

    @property
    def sample_id(self) -> str:
        return sample_id_of(self.step, self.place, self.generation)


class AsyncRolloutEngine:
    """Writes the samples of coming steps on servers. `prompts_of(step)` are this rank's; `wants_logprobs(step)` may differ."""

    name, awake = "rollout", False  # nothing of it is on this machine's devices

    def __init__(
        self, urls: Sequence[str], cfg: RolloutConfig, ahead: AsyncConfig, *, eos_ids: tuple[int, ...], seed: int,
        vocab: int, num_steps: int, prompts_of: Callable[[int], list[Prompt]], wants_logprobs: Callable[[int], bool],
        push: Push, token: str | None,
    ):  # fmt: skip
        self.cfg, self.ahead, self.eos_ids, self.seed, self.vocab = cfg, ahead, eos_ids, seed, vocab
        self.num_steps, self.prompts_of, self.wants_logprobs, self._push = num_steps, prompts_of, wants_logprobs, push
        self.policy_version = -1
        self.push_metrics: dict[str, float] = {}  # of the last push
        self.waited_s = 0.0  # for the responses of the last step
        limits = Limits(
            wait_s=ahead.rollout_wait_s, timeout_s=ahead.rollout_timeout_s, max_inflight=ahead.max_inflight,
            slow_factor=math.inf, patience_s=math.inf,  # a long response is not a slow replica
        )  # fmt: skip
        self.pool = ReplicaPool(
            "rollout", urls, probe=self._call("probe", [2, 3], 0, 1, 1.0, False, self._read_probe), limits=limits,
            api_key=token, progress=Call("/metrics", read=functools.partial(metric, name="opd_engine_steps_total")),
        )  # fmt: skip
        self.pool.excused = True  # without weights, a server answers nothing
        self._lock = threading.RLock()
        self._issued: dict[int, list[tuple[_Place, Future]]] = {}  # step -> its samples, in order
        self._next_step = 0
        self._hear: Callable[[Rollout], None] | None = None
        self._restored: dict[str, Rollout] = {}
        self.on_close = ExitStack()

    # ---- What the loop asks for ----

    def generate(
        self, prompts: Sequence[Prompt], step: int, *, with_logprobs: bool = True,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """The rollouts of a step, in the order of the synchronous engine; waits for those that are still being written."""
        self._listen(on_finished)
        samples = self._issued[step]
        assert [p.prompt_id for p in prompts] == [at.prompt.prompt_id for at, _ in samples[:: self.cfg.num_generations]]
        started = time.perf_counter()
        rollouts = self.pool.collect([landing for _, landing in samples])
        self.waited_s = time.perf_counter() - started
        del self._issued[step]
        return rollouts

    def generate_greedily(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response per prompt at temperature 0, for evaluation, under the weights of now."""
        futures = []
        for prompt in prompts:
            place = _Place(-1, prompt, prompt.prompt_id, 0)
            read = functools.partial(self._read, with_logprobs=False, oldest=self.policy_version)
            name = f"greedy-{prompt.prompt_id}"
            call = self._call(name, prompt.token_ids, 0, self.cfg.max_response_tokens, 0.0, False, read)
            futures.append((place, self.pool.submit(call)))
        answers = self.pool.collect([future for _, future in futures])
        return [self._rollout(place, answer) for (place, _), answer in zip(futures, answers, strict=True)]

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Pushes the student's weights to the servers, if this step is one to push after, and issues what that allows.

        Collective. Nothing is gathered where nothing is pushed.
        """
        first = self.policy_version < 0
        if not first and version % self.ahead.sync_every and version < self.num_steps:
            return
        self.pool.excused = True  # it is silent while it loads, and not dead
        try:
            self.push_metrics = self._push(named_parameters, version)
        finally:
            self.pool.excused = False
        if first:
            self._next_step = version
        self.policy_version = version
        self._advance()

    def sleep(self) -> None:
        """Nothing: the servers have devices of their own."""

    def wake(self, tags: list[str] | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Ends the pool, and servers that were started for this run: whatever is being written is given up."""
        self.pool.close()
        self.on_close.close()

    # ---- Running ahead ----

    def _advance(self) -> None:
        """Issues the samples of every step that the version of the weights allows."""
        with self._lock:
            last = min(self.policy_version + self.ahead.max_staleness, self.num_steps - 1)
            while self._next_step <= last:
                self._issue(self._next_step)
                self._next_step += 1

    def _issue(self, step: int) -> None:
        prompts = self.prompts_of(step)
        self._issued[step] = []
        for prompt, place in zip(prompts, places_of(prompts), strict=True):
            for generation in range(self.cfg.num_generations):
                at, landing = _Place(step, prompt, place, generation), Future()
                self._issued[step].append((at, landing))
                if (known := self._restored.pop(at.sample_id, None)) is not None:
                    self._land(landing, known)
                else:
                    self._send(at, landing)

    def _send(self, at: _Place, landing: Future) -> None:
        read = functools.partial(
            self._read, with_logprobs=self.wants_logprobs(at.step), oldest=at.step - self.ahead.max_staleness
        )
        seed = sample_seed(self.seed, at.step, at.prompt, at.place, at.generation)
        call = self._call(
            at.sample_id.replace("/", "-"), at.prompt.token_ids, seed, self.cfg.max_response_tokens, self.cfg.temperature,
            self.wants_logprobs(at.step), read,
        )  # fmt: skip
        fault_point("ahead.issue")
        self.pool.submit(call).add_done_callback(functools.partial(self._arrived, at, landing))

    def _arrived(self, at: _Place, landing: Future, future: Future) -> None:
        """In the pool's thread. Text that a push cut off is not kept: its prompt is sent again."""
        if landing.cancelled():  # its step was given up
            return
        try:
            answer = future.result(timeout=0)
            if answer.finish_reason == "aborted":
                self._send(at, landing)
                return
            self._land(landing, self._rollout(at, answer))
        except BaseException as error:  # nobody hears an exception in a callback
            landing.set_exception(error)

    def _land(self, landing: Future, rollout: Rollout) -> None:
        fault_point("ahead.landed")
        with self._lock:
            if self._hear is not None:
                self._hear(rollout)
            landing.set_result(rollout)

    def _listen(self, on_finished: Callable[[Rollout], None] | None) -> None:
        """From now on, `on_finished` hears of every response; of those that came before, now."""
        with self._lock:
            if on_finished is None or self._hear is not None:
                return
            self._hear = on_finished
            for samples in self._issued.values():
                for _, landing in samples:
                    if landing.done() and landing.exception(timeout=0) is None:
                        on_finished(landing.result(timeout=0))

    @property
    def ready(self) -> int:
        """Finished samples of coming steps."""
        with self._lock:
            return sum(landing.done() for samples in self._issued.values() for _, landing in samples)

    @property
    def in_flight(self) -> int:
        """Samples that are being written, or wait for a server."""
        with self._lock:
            return sum(map(len, self._issued.values())) - self.ready

    # ---- A checkpoint's part ----

    def save(self, directory: Path) -> None:
        """Writes this rank's part of a checkpoint: its samples of coming steps."""
        (directory / _buffer_file()).write_text(json.dumps(self.state()))

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote; a checkpoint of a synchronous run has nothing."""
        path = directory / _buffer_file()
        if path.exists():
            self.restore(json.loads(path.read_text()))

    def state(self) -> dict[str, Any]:
        """What a resume needs of the buffer: finished samples whole, and which others are being written."""
        with self._lock:
            samples = [sample for step in sorted(self._issued) for sample in self._issued[step]]
            finished = [f.result(timeout=0) for _, f in samples if f.done() and f.exception(timeout=0) is None]
        rows = [
            {
                "id": r.sample_id, "prompt_id": r.prompt.prompt_id, "response_ids": r.response_ids,
                "logprobs": r.rollout_logprobs, "finish_reason": r.finish_reason, "spans": r.policy_spans,
            }
            for r in finished
        ]  # fmt: skip
        known = {r.sample_id for r in finished}
        flying = [at.sample_id for at, _ in samples if at.sample_id not in known]
        return {"finished": rows, "in_flight": flying, "policy_version": self.policy_version}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the finished samples of a checkpoint; the others are written again, from the same prompts and seeds."""
        prompts = {}
        for step in {int(row["id"].split("/")[0]) for row in state["finished"]}:
            for prompt, place in zip(own := self.prompts_of(step), places_of(own), strict=True):
                prompts[step, place] = prompt
        for row in state["finished"]:
            step, place, generation = map(int, row["id"].split("/"))
            at = _Place(step, prompts[step, place], place, generation)
            assert at.prompt.prompt_id == row["prompt_id"], f"sample {row['id']}: another prompt than in the checkpoint"
            spans = [tuple(span) for span in row["spans"]]
            answer = _Answer(row["response_ids"], row["finish_reason"], spans, row["logprobs"])
            self._restored[row["id"]] = self._rollout(at, answer)

    # ---- Requests ----

    def _call(
        self, name: str, prompt_ids: list[int], seed: int, max_tokens: int, temperature: float, with_logprobs: bool,
        read: Callable[[bytes], Any],
    ) -> Call:  # fmt: skip
        body = {
            "request_id": name, "prompt_ids": prompt_ids, "seed": seed, "max_tokens": max_tokens,
            "temperature": temperature, "top_p": self.cfg.top_p if temperature else 1.0,
            "top_k": self.cfg.top_k if temperature else 0, "stop_ids": list(self.eos_ids), "with_logprobs": with_logprobs,
        }  # fmt: skip
        return Call(
            "/generate", json.dumps(body).encode(), request_id=name, most_bytes=(1 << 16) + 128 * max_tokens, read=read,
            tokens=len(prompt_ids) + max_tokens,
        )  # fmt: skip

    def _read(self, body: bytes, *, with_logprobs: bool, oldest: int) -> _Answer:
        """An answer that can be trained on, or aborted. Raises BadAnswer."""
        try:
            answer = msgspec.json.decode(body, type=_Answer)
        except msgspec.MsgspecError as error:
            raise BadAnswer(f"not a response: {error}") from None
        if answer.finish_reason == "aborted":
            return answer
        L = len(answer.token_ids)
        if answer.finish_reason not in ("stop", "length") or not 1 <= L <= self.cfg.max_response_tokens:
            raise BadAnswer(f"{L} tokens, finished because of {answer.finish_reason!r}")
        if not all(0 <= token < self.vocab for token in answer.token_ids):
            raise BadAnswer(f"a token outside the vocabulary of {self.vocab}")
        if with_logprobs and (
            answer.logprobs is None or len(answer.logprobs) != L
            or not all(math.isfinite(x) and x <= ABOVE_ZERO for x in answer.logprobs)
        ):  # fmt: skip
            raise BadAnswer(f"no finite log-probability for each of the {L} tokens")
        edges = [0, *(end for _, _, end in answer.spans)]
        if not answer.spans or [start for _, start, _ in answer.spans] != edges[:-1] or edges[-1] != L:
            raise BadAnswer(f"version spans {answer.spans} do not cover {L} tokens")
        if min(version for version, _, _ in answer.spans) < oldest:
            raise BadAnswer(f"tokens of version {min(answer.spans)[0]}, older than {oldest}: it missed a push")
        return answer

    def _read_probe(self, body: bytes) -> _Answer:
        return self._read(body, with_logprobs=False, oldest=self.policy_version)

    def _rollout(self, at: _Place, answer: _Answer) -> Rollout:
        return Rollout(
            sample_id=at.sample_id if at.step >= 0 else f"greedy/{at.prompt.prompt_id}/0",
            prompt=at.prompt,
            source="student",
            response_ids=answer.token_ids,
            rollout_logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            policy_version=min(version for version, _, _ in answer.spans),
            policy_spans=tuple(tuple(span) for span in answer.spans),
        )


def _buffer_file() -> str:
    return f"buffer_rank_{distributed.rank()}.json"


def push_from_rank_0(publish_and_push: Callable[[Iterable[tuple[str, Tensor]], int], dict[str, float]]) -> Push:
    """Rank 0 writes and pushes; the others take part in the gathering, and hear if it failed."""

    def push(named_parameters: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        found: dict[str, float] = {}
        parameters = iter(named_parameters)
        with distributed.agree_on_error(f"pushing weights of version {version}"):
            try:
                if distributed.rank() == 0:
                    found = publish_and_push(parameters, version)
            finally:
                for _ in parameters:  # gathering is collective: it ends on all ranks together, whatever happened on one
                    pass
        return found

    return push
