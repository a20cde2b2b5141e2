"""A run whose inputs are known to be good: what the parts of a trainer ask of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd import config, distributed
from opd.clients.health import Limits
from opd.clients.served_checks import api_key_of, limits_of
from opd.clients.served_model import ServedModel
from opd.clients.served_teacher import write_with_servers
from opd.distributed import resolve_dtype
from opd.inputs import order
from opd.inputs.adapters import engines_of
from opd.inputs.arguments import pairs
from opd.inputs.lora_rules import samples_with_adapter
from opd.inputs.models import ModelFact, ModelFacts
from opd.inputs.prompts import PromptSet
from opd.inputs.teacher_prompts import Feedback, load_feedback, longest_prompt, own_prompts
from opd.inputs.vision_rules import sample_of
from opd.mismatch import corrects
from opd.ops.lora import LoraLayout
from opd.padding import make_micro_batches
from opd.plan.job import PHASES
from opd.plan.planner import Plan
from opd.records.changes import FlagChange
from opd.rollout import write_with_model
from opd.types import MicroBatch, Prompt, Rollout, Sample, TeacherScores

Judge = Callable[[Prompt, list[int]], float]  # (prompt, response ids) -> score


def held_out(prompt_set: PromptSet, max_per_domain: int) -> list[Prompt]:
    """The prompts to evaluate on: all, or the first `max_per_domain` of each domain."""
    ids = prompt_set.ids_by_domain.values()
    return [
        prompt_set.prompts[i]
        for own in ids
        for i in (own[:max_per_domain] if max_per_domain else own)
    ]


@dataclass(frozen=True)
class Inputs:
    """What a run is made of: read, and all known to be good."""

    cfg: Any  # the script's Config
    ds_config: dict[str, Any]
    tokenizer: Any
    facts: ModelFacts
    served: dict[str, ServedModel]  # teacher name -> what its servers say it is
    train_set: PromptSet
    eval_set: PromptSet | None
    routes: dict[str, tuple[tuple[str, float], ...]]  # domain -> ((teacher, weight), ...)
    reward: Any  # (prompt, text) -> float

    @property
    def domains(self) -> tuple[str, ...]:
        return self.train_set.domains

    @functools.cached_property
    def eval_prompts(self) -> list[Prompt]:
        return held_out(self.eval_set, self.cfg.run.eval_max_prompts) if self.eval_set else []

    @functools.cached_property
    def unshared(self) -> dict[str, dict[int, str]]:
        """Domain -> tokens that one of its teachers does not have as the student has them -> the
        first such teacher. Without any, the domain is absent.

        What lies beyond the smallest vocabulary is in no loss of the run, whatever the domain.
        """
        sizes = {
            name: model.vocab_size for name, model in (self.facts.teachers | self.served).items()
        }
        beyond = range(self.facts.shared_vocab, self.facts.student.vocab_size)
        smallest = next((n for n, size in sizes.items() if size == self.facts.shared_vocab), "")
        found = {domain: dict.fromkeys(beyond, smallest) for domain in self.routes if beyond}
        for dialect in self.facts.dialects:
            for domain, chosen in self.routes.items():
                if dialect.foreign.ids and dialect.name in dict(chosen):
                    own = dict.fromkeys(dialect.foreign.ids, dialect.name)
                    found[domain] = own | found.get(domain, {})
        return found

    @functools.cached_property
    def feedback(self) -> dict[str, Feedback]:
        """Teacher -> the function that makes its prompts after the rollout."""
        own = own_prompts(self.cfg)
        return {name: load_feedback(it) for name, it in own.items() if it.kind == "function"}

    def length_for(self, spec: config.TeacherSpec) -> int:
        """Tokens of the longest sequence that a teacher reads or writes."""
        return longest_prompt(self.cfg, spec) + self.cfg.rollout.max_response_tokens

    @property
    def sampler_adapter(self) -> LoraLayout | None:
        """What the sampler takes instead of whole weights; None where it takes these."""
        student = self.facts.student
        return student.lora if samples_with_adapter(self.cfg, student) else None

    @property
    def engine_options(self) -> dict[str, Any]:
        """What every engine of this run is built with."""
        return {
            "dtype": str(resolve_dtype(self.cfg.model.dtype)).removeprefix("torch."),
            "max_model_len": self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_response_tokens,
            "trust_remote_code": self.cfg.model.trust_remote_code,
        }

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """At which tokens a response ends. Behind a placeholder no model could read on; nor could a
        teacher behind a token that it does not have.
        """
        student = self.facts.student
        unknown = range(self.facts.shared_vocab, student.vocab_size)
        return tuple(dict.fromkeys((*student.eos_ids, *student.placeholder_ids, *unknown)))

    @functools.cached_property
    def most_images(self) -> int:
        """Of one prompt."""
        sets = [self.train_set, *([self.eval_set] if self.eval_set else [])]
        return max(len(p.images.pictures) if p.images else 0 for own in sets for p in own.prompts)

    def images_per_prompt(self, fact: ModelFact) -> int | None:
        """What an engine of a model has to be ready for; None for one that sees none."""
        return self.most_images if fact.sees else None

    @functools.cached_property
    def shown(self) -> list[Prompt]:
        """Some prompts with images, if there are any."""
        return sample_of(self.train_set.prompts)

    @property
    def writing_options(self) -> dict[str, Any]:
        """What a teacher writes with, in a child process."""
        return {
            **self.engine_options,
            "eos_ids": self.stop_ids,
            "max_tokens": self.cfg.rollout.max_response_tokens,
            "seed": self.cfg.run.seed,
            "enforce_eager": self.cfg.rollout.enforce_eager,
        }

    def prompt_batch(
        self, step: int, rank: int | None = None, world_size: int | None = None
    ) -> list[Prompt]:
        """A rank's prompts of a step, this one's by default, mixed domains: a pure function of
        (seed, step).
        """
        return order.prompt_batch(
            self.train_set,
            step,
            seed=self.cfg.run.seed,
            prompts_per_step=self.cfg.rollout.prompts_per_step,
            domain_weights=pairs("domain_weights", self.cfg.data.domain_weights),
            rank=distributed.rank() if rank is None else rank,
            world_size=world_size or distributed.world_size(),
        )


@dataclass(frozen=True)
class Run(Inputs):
    """A run that may begin: its inputs, and its directory."""

    device: torch.device
    run_dir: Path
    hashes: dict[str, str]  # teacher name -> content hash
    fingerprint: dict[str, Any]
    resume_from: Path | None
    changes: list[FlagChange]  # of the fingerprint since that checkpoint, all of them wanted
    started: float
    plan: Plan | None  # what memory the run should take; None for a model that says too little

    @property
    def predicted(self) -> dict[str, int]:
        """phase -> bytes of this rank that the plan expects."""
        return {phase: self.plan.bytes_of(phase) for phase in PHASES} if self.plan else {}

    @property
    def spare(self) -> dict[str, int]:
        """phase -> bytes of the GPU that the plan leaves free."""
        return {phase: self.plan.spare(phase) for phase in PHASES} if self.plan else {}

    def kv_cache_gib(self, teacher: config.TeacherSpec | None = None) -> float:
        """The KV cache of a teacher's engine or of the sampler, GiB: as the flag says, or the plan.

        Without a plan engines take what one sequence takes.
        """
        flag = self.cfg.teacher.teacher_kv_cache_gib
        if teacher is None:
            flag = self.cfg.rollout.rollout_kv_cache_gib
        if flag != "auto":
            return flag
        if self.plan is None:
            return 0.0
        choices = self.plan.choices
        size = choices.kv_cache if teacher is None else choices.teacher_kv[teacher.name]
        return size / config.GIB

    @property
    def works_alone(self) -> bool:
        """Whether no engine is shared by ranks, which would wait for one that leaves its work."""
        sizes = [spec.tensor_parallel_size for spec in self.cfg.teachers]
        return max([self.cfg.rollout.rollout_tensor_parallel_size, *sizes]) == 1

    @property
    def limits(self) -> Limits:
        """Waits and bounds towards servers."""
        return limits_of(self.cfg)

    def why_silent(self, spec: config.TeacherSpec) -> str | None:
        """Why a teacher's own answers cannot be had; None if they can."""
        if spec.follows:
            return "it follows the student, and is the student itself at the start"
        served = self.served.get(spec.name)
        if served is not None and served.protocol != "json" and not spec.has_local_model:
            return (
                "a scoring server does not write; name a local directory of its model in its entry "
                "(`model`)"
            )
        planned = self.plan is not None and spec.name in self.plan.job.teachers
        if planned and spec.backend == "vllm" and not self.plan.teacher_writes(spec.name)[1]:
            return "it does not fit one device with the KV cache that writing takes"
        return None

    def write(
        self,
        spec: config.TeacherSpec,
        prompts: Sequence[Prompt],
        log: Path,
        *,
        temperature: float = 0.0,
    ) -> list[Sample]:
        """A teacher's responses to this rank's prompts: from its servers, or from a child process
        that is gone afterwards.
        """
        options = self.writing_options | {"temperature": temperature}
        options["max_model_len"] = self.length_for(spec)
        served = self.served.get(spec.name)
        if served is None or served.protocol != "json":
            backend = "vllm" if spec.is_served else spec.backend
            return write_with_model(
                spec.model,
                [p.as_read_by(spec.name) for p in prompts],
                log=log,
                backend=backend,
                adapter=spec.adapter,
                kv_cache_gib=self._writer_cache_gib(spec),
                images_per_prompt=self._images_per_prompt_of(spec),
                **options,
            )
        seeds = [distributed.fold_seed(self.cfg.run.seed, p.prompt_id, "teacher") for p in prompts]
        # it writes, and does not only read
        limits = dataclasses.replace(self.limits, timeout_s=10 * self.limits.timeout_s)
        asked = {name: options[name] for name in ("eos_ids", "max_tokens", "temperature")}
        return write_with_servers(
            spec,
            served,
            prompts,
            limits=limits,
            api_key=api_key_of(spec),
            seeds=seeds,
            vocab=self.facts.shared_vocab,
            **asked,
        )

    def _images_per_prompt_of(self, spec: config.TeacherSpec) -> int | None:
        fact = self.facts.teachers.get(spec.name)
        return None if fact is None else self.images_per_prompt(fact)

    def _writer_cache_gib(self, spec: config.TeacherSpec) -> float:
        """Of the child in which a teacher writes; it grows to what one sequence takes."""
        if self.plan is None or spec.name not in self.plan.job.teachers:
            return 0.0
        return self.plan.teacher_writes(spec.name)[0] / config.GIB

    def judge(self, prompt: Prompt, response_ids: list[int]) -> float:
        """The task reward of a response."""
        return self.reward(prompt, self.tokenizer.decode(response_ids, skip_special_tokens=True))

    def micro_batches(
        self, rollouts: Sequence[Rollout], scores: Sequence[tuple[TeacherScores, ...]]
    ) -> list[MicroBatch]:
        """Rollouts as the student computes them, as the batch section of the configuration says.

        Collective.
        """
        batch = self.cfg.batch
        return make_micro_batches(
            rollouts,
            scores,
            micro_batch_size=batch.micro_batch_size,
            max_tokens=batch.max_tokens_per_micro_batch,
            packed=batch.packing,
            pad_id=self.facts.pad_id,
            domains=self.domains,
            placeholder_ids=self.facts.student.placeholder_ids,
            shared_vocab=self.facts.shared_vocab,
            filler=min(self.shown, key=lambda p: len(p.token_ids), default=None),
        )

    @property
    def logprob_temperature(self) -> float | None:
        """Where sampler and student of the moment are compared in the loss: at which temperature.

        With an old policy of its own, the correction compares the sampler with that.
        """
        compares = corrects(self.cfg.loss) and self.cfg.loss.old_logprobs == "rollout"
        return self.cfg.rollout.temperature if compares else None

    @property
    def reads_logprobs(self) -> bool:
        """Whether somebody reads the sampler's log-probabilities: a correction, a PPO ratio, or the
        measurement against log-prob servers.
        """
        loss = self.cfg.loss
        return corrects(loss) or loss.clip_low is not None or loss.old_logprobs == "server"

    @functools.cached_property
    def teachers_of(self) -> Callable[[int], tuple[str, ...]]:
        """step -> the engines of this machine's teachers that its prompts need, those of all ranks,
        in the configuration's order, each under the name of its first teacher.
        """
        engines = engines_of(self.cfg.teachers)

        @functools.lru_cache(maxsize=8)
        def teachers_of(step: int) -> tuple[str, ...]:
            domains = {prompt.domain for prompt in self.prompt_batch(step, rank=0, world_size=1)}
            needed = {name for domain in domains for name, _ in self.routes[domain]}
            return tuple(
                name
                for name, specs in engines.items()
                if any(spec.name in needed for spec in specs)
            )

        return teachers_of
