"""Teachers: colocated engines that return hidden states, their `lm_head`, and the pool that routes
by domain. Teachers that are one model, with several adapters or without, share an engine.

Served teachers are beside them in the pool, and differ in one thing: they may start on a response
before the others are written.

L response length, K support size, V vocabulary, H teacher hidden size.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd import distributed
from opd.clients.served_teacher import ServedTeacher
from opd.config import LossConfig, TeacherSpec
from opd.faults import fault_point
from opd.log import warn
from opd.ops.finite import all_finite
from opd.ops.heads import MappedHead, OutputHead
from opd.ops.scores import response_states, score_responses
from opd.types import CANARY_IDS, Rollout, TeacherEngine, TeacherPayload, TeacherScores

CANARY_ROWS = 256  # of the head: a slice is enough to tell one hidden state from another


class ColocatedTeacher:
    """One model on this rank's GPU, asleep but while it scores, and the teachers that it is: itself
    or with an adapter. It has the name of the first of them, and one head for all.

    The head stays on the host, or in its file, and visits.

    A teacher whose weights did not come back would go on scoring, wrongly and without an error. So
    one log-probability of each, known from before its first sleep, is scored again after each wake;
    RuntimeError with its name if it is another.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        engine: TeacherEngine,
        head: OutputHead | MappedHead,
        others: Sequence[TeacherSpec] = (),
    ):
        self.name, self.spec, self.engine, self.head = spec.name, spec, engine, head.pinned()
        self.specs = {each.name: each for each in (spec, *others)}
        weight_VH = head.weight_VH
        self.bytes_per_token = weight_VH.shape[1] * weight_VH.element_size()  # of a hidden state
        self._canaries: dict[str, float] = {}
        self.remember_canaries()

    @property
    def awake(self) -> bool:
        return self.engine.awake

    @property
    def can_sleep(self) -> bool:
        return self.engine.can_sleep

    @property
    def bytes_awake(self) -> int:
        return self.engine.bytes_awake

    @property
    def bytes_prefetched(self) -> int:
        return self.engine.bytes_prefetched

    def sleep(self) -> None:
        self.engine.sleep()

    def rest(self) -> None:
        self.engine.rest()

    def prefetch(self) -> None:
        self.engine.prefetch()

    def wake(self, tags: list[str] | None = None) -> None:
        was_awake = self.engine.awake
        self.engine.wake(tags)
        if not self._canaries or was_awake:
            return
        tolerance = 1e-3 if self.head.weight_VH.dtype == torch.float32 else 0.05
        for name, logprob in self._canary_logprobs().items():
            if not abs(logprob - self._canaries[name]) <= tolerance:  # NaN included
                raise RuntimeError(
                    f"teacher {name} woke up with other weights: the log-probability of its "
                    f"canary is {logprob:.4f}, and was {self._canaries[name]:.4f} before it slept"
                )

    def remember_canaries(self) -> None:
        """Those of the weights of now; where it sleeps, of those that it wakes up with."""
        self._canaries = {}
        if self.engine is not None and self.engine.can_sleep and self.engine.awake:
            self._canaries = self._canary_logprobs()

    def _canary_logprobs(self) -> dict[str, float]:
        """By teacher: of one fixed token after fixed others, over the first rows of the
        vocabulary.
        """
        found = {}
        for name in self.specs:
            hidden_H = self.states([CANARY_IDS], name)[0][-1].float()
            logits_V = self.head.weight_VH[:CANARY_ROWS].float() @ hidden_H
            found[name] = float(logits_V.log_softmax(-1)[CANARY_IDS[0]])
        return found

    def states(self, sequences: list[list[int]], name: str) -> list[Tensor]:
        """Final hidden states [len, H] of each sequence, as this one of its teachers has them."""
        return self.engine.hidden_states(sequences, adapter=self._adapter_of(name))

    def _adapter_of(self, name: str) -> str:
        return name if self.specs[name].adapter else ""

    def most_calls(self, mine: int) -> int:
        """Calls of `hidden_states` due, `mine` on this rank: ranks that share the teacher make
        equally many.
        """
        return max(
            distributed.gather_in_group(
                mine, self.spec.tensor_parallel_size, f"teacher {self.name}"
            )
        )

    def hidden_states(self, rollouts: Sequence[Rollout], name: str | None = None) -> list[Tensor]:
        """[L, H] per rollout: the states that predict its response, of the teacher `name`, or of
        the first.
        """
        return response_states(
            self.engine,
            [(r.prompt.ids_for(name or self.name), r.response_ids) for r in rollouts],
            [r.prompt.images_for(name or self.name) for r in rollouts],
            self._adapter_of(name or self.name),
        )


@dataclass(frozen=True)
class _ScoringJob:
    """Rollouts that one teacher reads in one go, by their place among all, and what is kept of its
    hidden states.
    """

    indices: list[int]
    weights: list[float]
    payload: TeacherPayload


@dataclass(frozen=True, slots=True)
class _Asked:
    """A response that a served teacher is scoring."""

    future: Future
    num_bytes: int  # of the hidden states to come


# Hidden states that are scored and dropped lie on the host that long: enough for a prefill to be a
# good batch.
PIECE_BYTES = 64 << 20


class TeacherPool:
    """Scores each rollout with the teachers of its own domain.

    One teacher, many and mixtures are the same path.

    Hidden states wait on the host until the loss needs them. Where a step's would pass
    `cache_bytes`, the rest is scored at once and only its top-k is kept: the loss of those tokens
    is then the divergence on `support_k` tokens with its tail.

    With `streams` a served teacher scores a response from the moment that `hear` is told of it
    (`--teacher_mode standalone`); without, from the moment that all are there. `score` waits for
    whatever is not answered by then.
    """

    def __init__(
        self,
        teachers: Sequence[ColocatedTeacher],
        routes: dict[str, tuple[tuple[str, float], ...]],
        cfg: LossConfig,
        *,
        payload: TeacherPayload,
        cache_bytes: int,
        shared_vocab: int,
        device: torch.device,
        turns: Callable[[Collection[str]], Iterator[str]],
        served: Sequence[ServedTeacher] = (),
        streams: bool = False,
    ):
        self._turns = turns
        self.models = {teacher.name: teacher for teacher in teachers}  # each has its turn
        self.teachers = {name: model for model in teachers for name in model.specs}
        self.served, self.streams = {teacher.name: teacher for teacher in served}, streams
        # (sample, served teacher) -> what was asked
        self._under_way: dict[tuple[str, str], _Asked] = {}
        # a rollout engine may tell of responses from a thread of its own
        self._sending = threading.Lock()
        # in the last `score`, beyond all other work
        self.waited_s = dict.fromkeys(self.served, 0.0)
        self.routes, self.cfg, self.payload, self.device = routes, cfg, payload, device
        names = [*self.teachers, *self.served]
        # turns change, a token's scores do not
        self._place = {name: place for place, name in enumerate(names)}
        self.cache_bytes = cache_bytes
        # padded vocabularies differ; what they share is what the tokenizer can say
        self.shared_vocab = shared_vocab
        self.spilled_tokens = 0  # of the last `score`
        self._warned = False
        self._resident: tuple[str, OutputHead] | None = None

    def head(self, name: str) -> OutputHead:
        """The teacher's head on the device, cut to the shared vocabulary.

        One is resident at a time.
        """
        owner = (self.served if name in self.served else self.teachers)[name]
        if self._resident is None or self._resident[0] != owner.name:
            self._resident = None  # free the last one before the next arrives
            head = owner.head
            self._resident = (owner.name, head.cut(self.shared_vocab).to(self.device))
        return self._resident[1]

    def release_head(self) -> None:
        self._resident = None

    @property
    def hear(self) -> Callable[[Rollout], None] | None:
        """What a rollout engine should tell of each finished response; None where nobody is waiting
        for it.
        """
        return self._submit if self.streams and self.served else None

    def score(self, rollouts: Sequence[Rollout]) -> list[tuple[TeacherScores, ...]]:
        """One tuple of scores per rollout, in the order of the rollouts; every model wakes at most
        once, whatever adapters it has.

        No rollout is left without scores: whatever keeps a teacher from answering is raised, with
        its name.
        """
        try:
            for rollout in rollouts:
                self._submit(rollout)
            scores = self._score_here(rollouts)
            self._collect(rollouts, scores)
        except BaseException:
            with self._sending:
                for (_, name), asked in self._under_way.items():
                    self.served[name].pool.cancel([asked.future])
                self._under_way.clear()
            raise
        self.release_head()
        fault_point("score.done")
        return [tuple(sorted(row, key=lambda score: self._place[score.teacher])) for row in scores]

    def close(self) -> None:
        """Ends the threads and connections of served teachers."""
        for teacher in self.served.values():
            teacher.close()

    def _submit(self, rollout: Rollout) -> None:
        """Sends a response to its served teachers, each once."""
        if max(rollout.ids_within(self.shared_vocab)) >= self.shared_vocab:
            raise RuntimeError(
                f"prompt {rollout.prompt.prompt_id}: the response has token "
                f"{max(rollout.response_ids)}, beyond the {self.shared_vocab} tokens that all "
                "models share, and does not end there"
            )
        with self._sending:
            for name, _ in self.routes[rollout.prompt.domain]:
                if name in self.served and (rollout.sample_id, name) not in self._under_way:
                    fault_point("teachers.submit")
                    payload, size = self._payload_of_served(name, rollout)
                    future = self.served[name].submit(rollout, payload)
                    self._under_way[rollout.sample_id, name] = _Asked(future, size)

    def _payload_of_served(self, name: str, rollout: Rollout) -> tuple[TeacherPayload, int]:
        """Hidden states, and their bytes, as long as the cache has room: they are asked for before
        all responses are known.
        """
        payload = self.served[name].payload(self.payload)
        size = (
            len(rollout.response_ids) * self.served[name].bytes_per_token
            if "hidden" in payload
            else 0
        )
        return (
            ("topk", 0)
            if size and self._served_bytes + size > self.cache_bytes
            else (payload, size)
        )

    @property
    def _served_bytes(self) -> int:
        """Of the hidden states that were asked for and not yet handed out."""
        return sum(asked.num_bytes for asked in self._under_way.values())

    def _collect(self, rollouts: Sequence[Rollout], scores: list[list[TeacherScores]]) -> None:
        """Waits for the served teachers."""
        for name, teacher in self.served.items():
            started = time.perf_counter()
            mine = [
                (index, weight)
                for index, rollout in enumerate(rollouts)
                for known, weight in self.routes[rollout.prompt.domain]
                if known == name
            ]
            keys = [(rollouts[index].sample_id, name) for index, _ in mine]
            answers = teacher.collect([self._under_way[key].future for key in keys])
            with self._sending:
                for key in keys:
                    del self._under_way[key]
            for (index, weight), score in zip(mine, answers, strict=True):
                scores[index].append(replace(score, weight=weight))
                if "hidden" in self.payload and score.hidden is None:
                    self.spilled_tokens += len(rollouts[index].response_ids)
            self.waited_s[name] = time.perf_counter() - started

    def _score_here(self, rollouts: Sequence[Rollout]) -> list[list[TeacherScores]]:
        """What the colocated teachers say, in their turns."""
        work: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, rollout in enumerate(rollouts):
            for name, weight in self.routes[rollout.prompt.domain]:
                if name in self.teachers:
                    work[name].append((index, weight))
        share = self._share_that_fits(rollouts, work)
        scores: list[list[TeacherScores]] = [[] for _ in rollouts]
        self.spilled_tokens = 0
        # Ranks that share a model answer each other's requests, so each of them takes its turns.
        names = [
            name
            for name, model in self.models.items()
            if any(work[each] for each in model.specs) or model.spec.tensor_parallel_size > 1
        ]
        with closing(self._turns(names)) as turns:
            for model in turns:  # one awake at a time
                for name in self.models[model].specs:
                    for job, found in self._answers(name, rollouts, work[name], share):
                        rows = zip(job.indices, job.weights, found, strict=True)
                        for index, weight, score in rows:
                            scores[index].append(replace(score, weight=weight))
        return scores

    def _answers(
        self, name: str, rollouts: Sequence[Rollout], mine: list[tuple[int, float]], share: float
    ) -> Iterator[tuple[_ScoringJob, list[TeacherScores]]]:
        """One teacher's scores, job by job, while its model is awake."""
        model, jobs = self.teachers[name], list(self._jobs(name, rollouts, mine, share))
        idle = [_ScoringJob([], [], "sampled")] * (model.most_calls(len(jobs)) - len(jobs))
        for job in jobs + idle:
            read = [rollouts[index] for index in job.indices]
            yield job, self._score(name, read, model.hidden_states(read, name), job.payload)

    def _bytes_of(self, name: str, rollout: Rollout) -> int:
        return len(rollout.response_ids) * self.teachers[name].bytes_per_token

    def _share_that_fits(
        self, rollouts: Sequence[Rollout], work: dict[str, list[tuple[int, float]]]
    ) -> float:
        """Part of each teacher's hidden states that the cache holds: the same for all, so that none
        is spilled alone.
        """
        if "hidden" not in self.payload:
            return 1.0
        needed = sum(
            self._bytes_of(name, rollouts[index])
            for name, mine in work.items()
            for index, _ in mine
        )
        share = min(1.0, max(0, self.cache_bytes - self._served_bytes) / max(1, needed))
        if share < 1.0 and not self._warned:
            self._warned = True
            warn(
                f"--teacher_cache_bytes {self.cache_bytes} holds {share:.0%} of a step's teacher "
                f"hidden states ({needed} bytes on this rank); the other tokens are trained on the "
                f"teacher's top {self._k} tokens (--tail {self.cfg.tail}) instead of --support "
                f"{'full' if self.payload == 'hidden' else 'union_topk'}"
            )
        return share

    def _jobs(
        self, name: str, rollouts: Sequence[Rollout], mine: list[tuple[int, float]], share: float
    ) -> Iterator[_ScoringJob]:
        """First what is kept in full, then, in pieces, what is scored at once and dropped."""
        sizes = [self._bytes_of(name, rollouts[index]) for index, _ in mine]
        keeps = "hidden" in self.payload
        kept, filled = 0, 0
        while (
            keeps
            and kept < len(mine)
            and (share == 1.0 or filled + sizes[kept] <= share * sum(sizes))
        ):
            filled += sizes[kept]
            kept += 1
        if kept:
            yield _ScoringJob(
                [i for i, _ in mine[:kept]], [w for _, w in mine[:kept]], self.payload
            )
        piece_bytes, start = max(PIECE_BYTES, 0 if keeps else self.cache_bytes), kept
        while start < len(mine):
            end, filled = start + 1, sizes[start]
            while end < len(mine) and filled + sizes[end] <= piece_bytes:
                filled += sizes[end]
                end += 1
            if keeps:
                self.spilled_tokens += sum(
                    len(rollouts[index].response_ids) for index, _ in mine[start:end]
                )
            payload = "topk" if keeps else self.payload
            yield _ScoringJob(
                [i for i, _ in mine[start:end]], [w for _, w in mine[start:end]], payload
            )
            start = end

    @property
    def _k(self) -> int:
        return min(self.cfg.support_k, self.shared_vocab)

    def _score(
        self,
        name: str,
        rollouts: Sequence[Rollout],
        states: Sequence[Tensor],
        payload: TeacherPayload,
    ) -> list[TeacherScores]:
        """One teacher's scores, all responses in one pass over its head."""
        if not rollouts:
            return []
        for rollout, hidden_LH in zip(rollouts, states, strict=True):
            if not all_finite(hidden_LH):
                raise FloatingPointError(
                    f"teacher {name}: prompt {rollout.prompt.prompt_id}: hidden states are not "
                    "finite"
                )
        fields = [{"hidden": hidden_LH} if "hidden" in payload else {} for hidden_LH in states]
        if payload != "hidden":
            scores = score_responses(
                states,
                [r.ids_within(self.shared_vocab) for r in rollouts],
                self.head(name),
                support_k=0 if payload == "sampled" else self._k,
                temperature=self.cfg.loss_temperature,
                chunk_bytes=self.cfg.chunk_bytes,
            )
            fields = [kept | found for kept, found in zip(fields, scores, strict=True)]
        return [TeacherScores(teacher=name, weight=1.0, **found) for found in fields]
