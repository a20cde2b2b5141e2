"""Questions from many clients, answered by the one thread that owns the engine.

vLLM's engines are not made for threads, so one thread builds the engine, asks it and scores what it
says; everybody else leaves questions in a queue. What waits there goes into a prefill together, up
to a budget of tokens: questions with other supports, temperatures or payloads differ only behind
the hidden states, where they are scored group by group.

L response tokens of one question, H hidden size.
"""

import os
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from opd.clients.wire import Question, checked_scores, encode_arrays
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.ops.heads import OutputHead
from opd.ops.scores import response_states, score_responses

IDLE_SECONDS = 1.0  # between two looks of a thread that nobody has woken


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What shares a prefill. One question always may, however long."""

    tokens: int = 8192
    sequences: int = 64
    wait_seconds: float = 0.002  # of the oldest question, for others to come; 0 takes what is there


def join_alone() -> None:
    """Makes this process a world of its own, which vLLM wants, without a socket that other machines
    reach.
    """
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(
        alone, GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo", VLLM_HOST_IP="127.0.0.1"
    )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # a TCP store listens everywhere
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class Answering(Protocol):
    """What the engine's thread owns."""

    def score(self, questions: Sequence[Any]) -> list[dict[str, Tensor]]:
        """The arrays that answer each question, on the host."""

    def encode(self, arrays: dict[str, Tensor], question: Any) -> Any:
        """What is sent for them. ValueError for what no model says."""


class Scorer:
    """An engine of hidden states with its head: what `TeacherPool` does with a teacher, for
    questions from the wire.
    """

    def __init__(self, engine: HiddenStateEngine | HFEngine, head: OutputHead, dtype: torch.dtype):
        self.engine, self.head, self.dtype = engine, head, dtype

    def score(self, questions: Sequence[Question]) -> list[dict[str, Tensor]]:
        """The fields of `Question.shapes` for each, on the host."""
        states = self._hidden_states(questions)
        answers = [
            {"hidden": state} if "hidden" in question.payload else {}
            for question, state in zip(questions, states, strict=True)
        ]
        groups: dict[tuple[int, float, int], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            if question.payload != "hidden":
                groups[question.vocab, question.temperature, question.support_k].append(index)
        for (vocab, temperature, support_k), members in groups.items():
            scores = score_responses(
                [states[index] for index in members],
                [questions[index].response_ids for index in members],
                self.head.cut(vocab),
                support_k=support_k,
                temperature=temperature,
            )
            for index, found in zip(members, scores, strict=True):
                answers[index] |= found
        return answers

    def encode(self, arrays: dict[str, Tensor], question: Question) -> bytes:
        """The body of an answer."""
        return encode_arrays(checked_scores(arrays, question))

    def _hidden_states(self, questions: Sequence[Question]) -> list[Tensor]:
        """[L, H] of each; the engine is not asked about an empty response."""
        texts = [(q.prompt_ids, q.response_ids) for q in questions if q.response_ids]
        images = [q.images for q in questions if q.response_ids]
        found = iter(response_states(self.engine, texts, images))
        nothing_0H = torch.empty(0, self.head.weight_VH.shape[1], dtype=self.dtype)
        return [next(found) if q.response_ids else nothing_0H for q in questions]


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    question: Any = None  # with `num_tokens`
    act: Callable | None = None  # instead of a question
    answer: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        return self.question.num_tokens if self.act is None else 0


class ScoringThread:
    """The thread that owns the engine, and the queue before it.

    `ready` holds its scorer, or why there is none.
    """

    def __init__(self, build: Callable[[], Answering], limits: BatchLimits):
        self.limits = limits
        self.ready: Future[Answering] = Future()
        self.requests = self.tokens = self.batches = 0  # answered so far
        self._jobs: deque[_Question] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, args=(build,), name="engine", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Questions that are not in a prefill yet."""
        return len(self._jobs)

    def submit(self, question: Any) -> Future:
        """The future answer, encoded. Who cancels it before its turn costs no computation."""
        return self._add(_Question(question))

    def do(self, act: Callable[[Any], Any]) -> Future:
        """The future result of `act(scorer)`, alone: after every question that came before, ahead
        of those that come later.
        """
        return self._add(_Question(act=act))

    def _add(self, job: _Question) -> Future:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def _run(self, build: Callable[[], Answering]) -> None:
        try:
            scorer = build()
        except BaseException as error:  # whoever waits for `ready` raises it
            self.ready.set_exception(error)
            return
        self.ready.set_result(scorer)
        while True:
            batch = self._next_batch()
            if batch and batch[0].act is not None:
                self._act(scorer, batch[0])
            elif batch:
                self._answer(scorer, batch)

    def _next_batch(self) -> list[_Question]:
        """The next questions that nobody has cancelled; now and then none."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._jobs, timeout=IDLE_SECONDS):
                return []
            deadline = self._jobs[0].since + self.limits.wait_seconds
            while (left := deadline - time.monotonic()) > 0 and not self._is_full():
                self._changed.wait(left)
            batch, tokens = [], 0
            while self._jobs and len(batch) < self.limits.sequences:
                tokens += self._jobs[0].num_tokens
                if batch and (tokens > self.limits.tokens or self._jobs[0].act is not None):
                    break
                batch.append(self._jobs.popleft())
                if batch[0].act is not None:
                    break
        return [job for job in batch if job.answer.set_running_or_notify_cancel()]

    def _is_full(self) -> bool:
        """Whether waiting brings nothing to the next batch: its room is taken, or something else
        comes behind it.
        """
        tokens = sum(job.num_tokens for job in self._jobs)
        acts = any(job.act is not None for job in self._jobs)
        return acts or len(self._jobs) >= self.limits.sequences or tokens >= self.limits.tokens

    def _act(self, scorer: Answering, job: _Question) -> None:
        try:
            job.answer.set_result(job.act(scorer))
        except Exception as error:  # whatever it is, whoever waits for it hears it
            traceback.print_exc()
            job.answer.set_exception(error)

    def _answer(self, scorer: Answering, batch: list[_Question]) -> None:
        try:
            answers = scorer.score([job.question for job in batch])
        except Exception as error:  # whatever it is, it is these questions' and not the next ones'
            traceback.print_exc()
            # images of one question may be what its model does not take
            if len(batch) > 1 and any(job.question.images for job in batch):
                for job in batch:
                    self._answer(scorer, [job])
                return
            for job in batch:
                job.answer.set_exception(error)
            return
        self.batches += 1
        self.requests += len(batch)
        self.tokens += sum(job.num_tokens for job in batch)
        for job, arrays in zip(batch, answers, strict=True):
            try:  # one text may overflow where the others of its batch do not
                job.answer.set_result(scorer.encode(arrays, job.question))
            except ValueError as error:
                job.answer.set_exception(error)
