"""Rollouts from servers, begun before they are asked for.

It stands where the colocated rollout engine stands in the loop.

A finished response goes to its teachers at once, and to the log-prob servers if there are any: what
they say of it, the old policy of `--old_logprobs server`, is part of the sample.

Order, not luck: step s trains on the same prompts, places and seeds as in the synchronous trainer,
and its samples are issued as soon as the version v of the pushed weights reaches s - max_staleness.
Hence

* a sample is never staler than the bound, because it was issued within it, and no finished sample
  is ever dropped;
* long responses are not discriminated against: a step waits for all of its own, while later steps
  are being written;
* with `max_staleness` 0 nothing runs ahead, and the run is the synchronous one.

Each rank issues its own share of the samples, to the same servers. Rank 0 pushes the weights.
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from opd import distributed
from opd.clients.logprob_servers import LogprobServers
from opd.clients.rollout_servers import Answer, RolloutServers
from opd.config import AsyncConfig, RolloutConfig
from opd.faults import fault_point
from opd.rollout import places_of, sample_id_of, sample_seed
from opd.types import OldPolicy, Prompt, Rollout

FRESH_PROMPTS, FRESH_TOKENS = (
    8,
    32,
)  # of what is asked for to see whether the servers have the weights of now

# (parameters, version) -> metrics; collective
PushWeights = Callable[[Iterable[tuple[str, Tensor]], int], dict[str, float]]

Life = Generator[Future, Any, None]  # what a sample goes through: it yields what it waits for

Life = Generator[Future, Any, None]  # what a sample goes through: it yields what it waits for


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
    """Writes the samples of coming steps on servers. `prompts_of(step)` are this rank's."""

    name, awake = "rollout", False  # nothing of it is on this machine's devices
    takes_adapter = False  # servers get whole weights

    def __init__(
        self,
        servers: RolloutServers,
        cfg: RolloutConfig,
        ahead: AsyncConfig,
        *,
        seed: int,
        num_steps: int,
        prompts_of: Callable[[int], list[Prompt]],
        push: PushWeights,
        logprob_servers: LogprobServers | None = None,
    ):
        self.servers, self.logprob_servers, self.cfg, self.ahead, self.seed = (
            servers,
            logprob_servers,
            cfg,
            ahead,
            seed,
        )
        self.num_steps, self.prompts_of, self._push = num_steps, prompts_of, push
        self.pools = (
            [servers.pool] if logprob_servers is None else [servers.pool, logprob_servers.pool]
        )
        self.policy_version = -1
        self.push_metrics: dict[str, float] = {}  # of this step's push, if there was one
        self.push_s = 0.0  # that this step spent on it
        self.waited_s = 0.0  # for the responses of the last step
        self._excuse(True)  # without weights, a server answers nothing
        self._lock = threading.RLock()
        self._issued: dict[int, list[tuple[_Place, Future]]] = {}  # step -> its samples, in order
        self._next_step = 0
        self._hear: Callable[[Rollout], None] | None = None
        self._restored: dict[str, Rollout] = {}
        self.on_close = ExitStack()

    # ---- What the loop asks for ----

    def generate(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        with_logprobs: bool = True,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """The rollouts of a step, in the order of the synchronous engine; waits for those that are
        still being written.

        They were asked for before, and have log-probabilities whatever `with_logprobs` says.
        """
        self._listen(on_finished)
        samples = self._issued[step]
        assert [p.prompt_id for p in prompts] == [
            at.prompt.prompt_id for at, _ in samples[:: self.cfg.num_generations]
        ]
        started = time.perf_counter()
        rollouts = self.servers.pool.collect([landing for _, landing in samples])
        self.waited_s = time.perf_counter() - started
        del self._issued[step]
        return rollouts

    def generate_greedily(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response per prompt at temperature 0, for evaluation, under the weights of now."""
        return self._answers(prompts, "greedy", temperature=0.0, with_logprobs=False)

    def _answers(self, prompts: Sequence[Prompt], name: str, **options) -> list[Rollout]:
        """One response per prompt, asked for now and waited for."""
        places = [_Place(-1, prompt, prompt.prompt_id, 0) for prompt in prompts]
        futures = [
            self.servers.submit(
                f"{name}-{prompt.prompt_id}",
                prompt.token_ids,
                images=prompt.images,
                seed=0,
                oldest=self.policy_version,
                **options,
            )
            for prompt in prompts
        ]
        answers = self.servers.pool.collect(futures)
        return [self._rollout(place, answer) for place, answer in zip(places, answers, strict=True)]

    def fresh(self, rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
        """Responses that the weights of `step` have written, of its rollouts or, if all of them are
        stale, a few short new ones.

        None if the weights of `step` were not pushed.
        """
        if self.policy_version != step:
            return []
        if found := [rollout for rollout in rollouts if rollout.policy_version == step]:
            return found
        return self._answers(
            [rollout.prompt for rollout in rollouts[:FRESH_PROMPTS]],
            "fresh",
            temperature=self.cfg.temperature,
            with_logprobs=True,
            most_tokens=FRESH_TOKENS,
        )

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Pushes the student's weights to the servers, if this step is one to push after, and
        issues what that allows.

        Collective. Nothing is gathered where nothing is pushed.
        """
        first, self.push_metrics, self.push_s = self.policy_version < 0, {}, 0.0
        if not first and version % self.ahead.sync_every and version < self.num_steps:
            return
        self._excuse(True)  # a server is silent while it loads, and not dead
        started = time.perf_counter()
        try:
            self.push_metrics = self._push(named_parameters, version)
        finally:
            self._excuse(False)
        self.push_s = time.perf_counter() - started
        if first:
            self._next_step = version
        self.policy_version = self.servers.oldest = version
        if self.logprob_servers is not None:
            self.logprob_servers.oldest = version
        self._advance()

    def _excuse(self, excused: bool) -> None:
        for pool in self.pools:
            pool.excused = excused

    def sleep(self) -> None:
        """Nothing: the servers have devices of their own."""

    def wake(self, tags: list[str] | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Ends the pools, and servers that were started for this run: whatever is being written is
        given up.
        """
        for pool in self.pools:
            pool.close()
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
                _follow(self._life(at, landing), landing)

    def _life(self, at: _Place, landing: Future) -> Life:
        """A sample, from its prompt until it lies ready for its step."""
        rollout = self._restored.pop(at.sample_id, None)
        if rollout is None:
            answer = yield self._ask(at)
            while answer.aborted:  # text that a push cut off is not kept
                answer = yield self._ask(at)
            rollout = self._rollout(at, answer)
            self.servers.flow.lengths.append(len(rollout.response_ids))
            if self.logprob_servers is not None:
                self._tell(rollout)  # teachers and log-prob servers work at the same time
                # the old policy is not older than the sampler
                newest = max(version for version, _, _ in answer.spans)
                old = yield self.logprob_servers.submit(rollout, oldest=newest)
                old = OldPolicy(old.version, old.logprobs_L.tolist(), old.entropy_L.tolist())
                rollout = replace(rollout, old_policy=old)
        fault_point("ahead.landed")
        with self._lock:
            self._tell(rollout)
            landing.set_result(rollout)

    def _ask(self, at: _Place) -> "Future[Answer]":
        fault_point("ahead.issue")
        return self.servers.submit(
            at.sample_id.replace("/", "-"),
            at.prompt.token_ids,
            images=at.prompt.images,
            seed=sample_seed(self.seed, at.step, at.prompt, at.place, at.generation),
            temperature=self.cfg.temperature,
            with_logprobs=True,
            oldest=at.step - self.ahead.max_staleness,
        )

    def _tell(self, rollout: Rollout) -> None:
        """To whoever listens; twice is fine."""
        with self._lock:
            if self._hear is not None:
                self._hear(rollout)

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
            return sum(
                landing.done() for samples in self._issued.values() for _, landing in samples
            )

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
        """Reads what `save` wrote, on however many ranks; a checkpoint of a synchronous run has
        nothing.
        """
        states = [json.loads(path.read_text()) for path in directory.glob("buffer_rank_*.json")]
        self.restore({"finished": [row for state in states for row in state["finished"]]})

    def state(self) -> dict[str, Any]:
        """What a resume needs of the buffer: finished samples whole, and which others are being
        written.
        """
        with self._lock:
            samples = [sample for step in sorted(self._issued) for sample in self._issued[step]]
            finished = [
                f.result(timeout=0)
                for _, f in samples
                if f.done() and f.exception(timeout=0) is None
            ]
        rows = [
            {
                "id": r.sample_id,
                "prompt_id": r.prompt.prompt_id,
                "response_ids": r.response_ids,
                "logprobs": r.rollout_logprobs,
                "finish_reason": r.finish_reason,
                "spans": r.policy_spans,
                "old_policy": r.old_policy and asdict(r.old_policy),
            }
            for r in finished
        ]
        known = {r.sample_id for r in finished}
        flying = [at.sample_id for at, _ in samples if at.sample_id not in known]
        return {"finished": rows, "in_flight": flying, "policy_version": self.policy_version}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the finished samples of a checkpoint that are this rank's; the others are written
        again, from the same prompts and seeds.
        """
        prompts = {}
        for step in {int(row["id"].split("/")[0]) for row in state["finished"]}:
            for prompt, place in zip(own := self.prompts_of(step), places_of(own), strict=True):
                prompts[step, place] = prompt
        for row in state["finished"]:
            step, place, generation = map(int, row["id"].split("/"))
            if (step, place) not in prompts:  # another rank's
                continue
            at = _Place(step, prompts[step, place], place, generation)
            assert at.prompt.prompt_id == row["prompt_id"], (
                f"sample {row['id']}: another prompt than in the checkpoint"
            )
            spans = [tuple(span) for span in row["spans"]]
            answer = Answer(row["response_ids"], row["finish_reason"], spans, row["logprobs"])
            old = row["old_policy"] and OldPolicy(**row["old_policy"])
            self._restored[row["id"]] = replace(self._rollout(at, answer), old_policy=old)

    def _rollout(self, at: _Place, answer: Answer) -> Rollout:
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


def _follow(life: Life, landing: Future, answered: Future | None = None) -> None:
    """Takes a life to its next wait, and from there on when that is over: in a pool's thread."""
    if landing.cancelled():  # its step was given up
        return
    try:
        waits_for = life.send(answered and answered.result(timeout=0))
    except StopIteration:
        return
    except BaseException as error:  # nobody hears an exception in a callback
        landing.set_exception(error)
    else:
        waits_for.add_done_callback(functools.partial(_follow, life, landing))


def _buffer_file() -> str:
    return f"buffer_rank_{distributed.rank()}.json"


def push_from_rank_0(
    publish_and_push: Callable[[Iterable[tuple[str, Tensor]], int], dict[str, float]],
) -> PushWeights:
    """Rank 0 writes and pushes; the others take part in the gathering, and hear if it failed."""

    def push(named_parameters: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        found: dict[str, float] = {}
        parameters = iter(named_parameters)
        with distributed.agree_on_error(f"pushing weights of version {version}"):
            try:
                if distributed.rank() == 0:
                    found = publish_and_push(parameters, version)
            finally:
                # gathering is collective: it ends on all ranks together, whatever happened on one
                for _ in parameters:
                    pass
        return found

    return push
