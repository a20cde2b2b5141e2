"""What both trainers set up alike, and what they write down: checks, data, teachers, evaluation, checkpoints, report.

Nothing here knows a loss. `prepare` finds every mistake of the user before a weight is loaded.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from opd import (
    checkpoint,
    config,
    content,
    data,
    distributed,
    evaluation,
    export,
    faults,
    preflight,
    report,
    rewards,
)
from opd.deepspeed_engine import check_ds_config
from opd.ledger import GIB, Ledger
from opd.metrics import Metrics, say, setup_logging, write_run_files
from opd.mismatch import corrects
from opd.padding import make_micro_batches
from opd.plan import plan_run
from opd.plan_types import PHASES
from opd.planner import Plan
from opd.replica import Limits
from opd.rollout import RolloutEngine, write_with_model
from opd.served_model import ServedModel
from opd.served_preflight import api_key_of, check_served, limits_of
from opd.served_teachers import write_with_servers
from opd.student import Student, resolve_dtype
from opd.types import LoopState, MicroBatch, Prompt, Rollout, TeacherScores
from opd.validation import load_ds_config
from opd.vllm_engine import Sample


@dataclass(frozen=True)
class Run:
    """A run whose inputs are all known to be good."""

    cfg: Any  # the script's Config
    device: torch.device
    run_dir: Path
    ds_config: dict[str, Any]
    tokenizer: Any
    facts: preflight.ModelFacts
    train_set: data.PromptSet
    eval_set: data.PromptSet | None
    routes: dict[str, tuple[tuple[str, float], ...]]  # domain -> ((teacher, weight), ...)
    reward: Any  # (prompt, text) -> float
    hashes: dict[str, str]  # teacher name -> content hash
    served: dict[str, ServedModel]  # teacher name -> what its servers say it is
    fingerprint: dict[str, Any]
    resume_from: Path | None
    started: float
    plan: Plan | None = None  # what memory the run should take; None for a model that says too little

    @property
    def domains(self) -> tuple[str, ...]:
        return self.train_set.domains

    @functools.cached_property
    def eval_prompts(self) -> list[Prompt]:
        return evaluation.held_out(self.eval_set, self.cfg.run.eval_max_prompts) if self.eval_set else []

    @property
    def predicted(self) -> dict[str, int]:
        """phase -> bytes of this rank that the plan expects."""
        return {phase: self.plan.bytes_of(phase) for phase in PHASES} if self.plan else {}

    @property
    def spare(self) -> dict[str, int]:
        """phase -> bytes of the GPU that the plan leaves free."""
        return {phase: self.plan.spare(phase) for phase in PHASES} if self.plan else {}

    @property
    def engine_options(self) -> dict[str, Any]:
        """What every engine of this run is built with."""
        return {
            "dtype": str(resolve_dtype(self.cfg.model.dtype)).removeprefix("torch."),
            "max_model_len": self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_response_tokens,
            "trust_remote_code": self.cfg.model.trust_remote_code,
        }

    @property
    def limits(self) -> Limits:
        """Waits and bounds towards servers."""
        return limits_of(self.cfg)

    def can_write(self, spec: config.TeacherSpec) -> bool:
        """Whether answers of a teacher can be had: a scoring server does not write, and its model may not be here."""
        served = self.served.get(spec.name)
        return served is None or served.protocol == "json" or spec.has_local_model

    def write(
        self, spec: config.TeacherSpec, prompts: Sequence[Prompt], log: Path, *, temperature: float = 0.0
    ) -> list[Sample]:
        """A teacher's responses to this rank's prompts: from its servers, or from a child process that is gone afterwards."""
        options = self.writing_options | {"temperature": temperature}
        served = self.served.get(spec.name)
        if served is None or served.protocol != "json":
            backend = "vllm" if spec.is_served else spec.backend
            return write_with_model(spec.model, prompts, log=log, backend=backend, **options)
        seeds = [distributed.fold_seed(self.cfg.run.seed, p.prompt_id, "teacher") for p in prompts]
        limits = dataclasses.replace(self.limits, timeout_s=10 * self.limits.timeout_s)  # it writes, and does not only read
        asked = {name: options[name] for name in ("eos_ids", "max_tokens", "temperature")}
        return write_with_servers(
            spec, served, prompts, limits=limits, api_key=api_key_of(spec), seeds=seeds, vocab=self.facts.shared_vocab, **asked
        )  # fmt: skip

    @property
    def writing_options(self) -> dict[str, Any]:
        """What a teacher writes with, in a child process."""
        return {
            **self.engine_options,
            "kv_cache_gib": self.cfg.rollout.rollout_kv_cache_gib,
            "eos_ids": self.facts.student.eos_ids,
            "max_tokens": self.cfg.rollout.max_response_tokens,
            "seed": self.cfg.run.seed,
            "enforce_eager": self.cfg.rollout.enforce_eager,
        }

    def judge(self, prompt: Prompt, response_ids: list[int]) -> float:
        """The task reward of a response."""
        return self.reward(prompt, self.tokenizer.decode(response_ids, skip_special_tokens=True))

    def micro_batches(
        self, rollouts: Sequence[Rollout], scores: Sequence[tuple[TeacherScores, ...]]
    ) -> list[MicroBatch]:
        """Rollouts as the student computes them, as the batch section of the configuration says. Collective."""
        batch = self.cfg.batch
        return make_micro_batches(
            rollouts, scores, micro_batch_size=batch.micro_batch_size, max_tokens=batch.max_tokens_per_micro_batch,
            packed=batch.packing, pad_id=self.facts.pad_id, domains=self.domains,
        )  # fmt: skip

    @property
    def reads_logprobs(self) -> bool:
        """Whether the loss reads the sampler's log-probabilities: a correction, or a PPO ratio."""
        return corrects(self.cfg.loss) or self.cfg.loss.clip_low is not None

    @functools.cached_property
    def teachers_of(self) -> Callable[[int], tuple[str, ...]]:
        """step -> the teachers of this machine that its prompts need, those of all ranks, in the configuration's order."""

        @functools.lru_cache(maxsize=8)
        def teachers_of(step: int) -> tuple[str, ...]:
            domains = {prompt.domain for prompt in self.prompt_batch(step, rank=0, world_size=1)}
            needed = {name for domain in domains for name, _ in self.routes[domain]}
            return tuple(spec.name for spec in self.cfg.teachers if spec.name in needed and not spec.is_served)

        return teachers_of

    def prompt_batch(self, step: int, rank: int | None = None, world_size: int | None = None) -> list[Prompt]:
        """A rank's prompts of a step, this one's by default, mixed domains: a pure function of (seed, step)."""
        return data.prompt_batch(
            self.train_set,
            step,
            seed=self.cfg.run.seed,
            prompts_per_step=self.cfg.rollout.prompts_per_step,
            domain_weights=config.pairs("domain_weights", self.cfg.data.domain_weights),
            rank=distributed.rank() if rank is None else rank,
            world_size=world_size or distributed.world_size(),
        )


@contextmanager
def user_errors():
    """A user's mistake, a ValueError in here, becomes one line on rank 0 and exit status 2."""
    try:
        yield
    except ValueError as error:
        if distributed.rank() == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # rank 0 speaks first: launchers end all ranks when one has left
        sys.exit(2)


def prepare(cfg, *, need_response: bool = False) -> Run:
    """Joins the ranks and checks everything that can be checked before a weight is loaded; a `--dry_run` ends here.

    Raises ValueError with one line for whatever the user has to mend. A program calls it in `distributed.exit_together`.
    """
    started = time.time()
    faults.check()
    cfg.validate()
    device = distributed.init(cfg.run.local_rank)
    moment = checkpoint.first_start(Path(cfg.run.output_dir), cfg.run.resume)
    with distributed.agree_on_error("checking the inputs"):
        run = _read_inputs(cfg, device, need_response, moment)
    cfg, plan, memory = plan_run(cfg)
    run = dataclasses.replace(run, cfg=cfg, plan=plan)
    if cfg.run.dry_run:
        say(preflight.dry_run_report(cfg, run.train_set, run.tokenizer, run.facts, memory=memory))
        distributed.barrier()  # nobody leaves while another is in a collective operation
        sys.exit(0)

    hashes = {
        t.name: content.content_hash(t.model) if not t.is_served or t.has_local_model else run.served[t.name].identity
        for t in cfg.teachers
    }
    fingerprint = _fingerprint(cfg, hashes, run.train_set.content_hash)
    fingerprint["eval"] = _asked(run)
    if run.train_set.moment:
        fingerprint[checkpoint.FIRST_START] = run.train_set.moment.isoformat()
    resume_from = checkpoint.find(run.run_dir, cfg.run.resume)
    if resume_from is not None:  # the fingerprint compares contents, so models and data may have moved
        checkpoint.check_fingerprint(resume_from, fingerprint)
    else:
        preflight.check_output_dir(run.run_dir, cfg.run.resume, cfg)
    try:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {run.run_dir}: cannot be made: {error}; choose another") from None
    checkpoint.set_aside_newer(run.run_dir, resume_from)
    distributed.die_with_launcher()
    if distributed.rank() == 0:
        write_run_files(run.run_dir, config.to_dict(cfg), sys.argv)
    setup_logging(run.run_dir)
    say(f"resumes from {resume_from}" if resume_from else "starts fresh")
    for name, prompt_set in (("training", run.train_set), ("held-out", run.eval_set)):
        if prompt_set is not None:
            say(f"{name} prompts: {prompt_set.summary}")
    return dataclasses.replace(run, hashes=hashes, fingerprint=fingerprint, resume_from=resume_from, started=started)


def _read_inputs(cfg, device: torch.device, need_response: bool, moment: datetime | None = None) -> Run:
    """Models' configurations, tokenizer, prompts and routes, each checked against the others; no collective."""
    ds_config = load_ds_config(cfg.run.ds_config)
    tokenizer = preflight.load_tokenizer(cfg.model.student_model, cfg.model.trust_remote_code)
    facts = preflight.check_models(cfg)
    preflight.check_tensor_parallel(cfg, facts, distributed.world_size())
    facts, served = check_served(cfg, tokenizer, facts)
    takes_all = next((t.name for t in cfg.teachers if t.domains == "*"), None)
    load = functools.partial(data.load_prompts, tokenizer=tokenizer, cfg=cfg.data, default_domain=takes_all, moment=moment)
    train_set = load(
        cfg.data.data, flag="--data", need_answer=cfg.loss.reward_weight > 0, need_response=need_response,
        max_response_tokens=cfg.rollout.max_response_tokens, eos_ids=facts.student.eos_ids,
    )  # fmt: skip
    eval_set = load(cfg.data.eval_data, flag="--eval_data", need_answer=True) if cfg.data.eval_data else None
    routes = data.routes(cfg.teachers, [s for s in (train_set, eval_set) if s])
    reward = rewards.load_rewards(cfg.loss.reward_fn, routes)
    preflight.check_downloads(cfg)
    check_ds_config(cfg.run.ds_config, ds_config)
    run = Run(
        cfg=cfg, device=device, run_dir=Path(cfg.run.output_dir), ds_config=ds_config, tokenizer=tokenizer, facts=facts,
        train_set=train_set, eval_set=eval_set, routes=routes, reward=reward, hashes={}, served=served, fingerprint={},
        resume_from=None, started=0.0,
    )  # fmt: skip
    run.prompt_batch(0)  # refuses batch sizes and domain weights that do not fit
    judged = [*run.eval_prompts, *(train_set.prompts if cfg.loss.reward_weight > 0 else ())]
    rewards.check_answers(judged, cfg.loss.reward_fn, routes)
    return run


# May change under a resumed run, say after it ran out of memory: they decide what fits or is shown, not what is computed.
_WITHOUT_EFFECT = (
    "rollout_kv_cache_gib", "teacher_kv_cache_gib", "rollout_tensor_parallel_size", "enforce_eager", "loss_chunk_bytes",
    "overlap_k",
)  # fmt: skip


def _staleness(cfg) -> dict[str, Any]:
    """What makes an asynchronous run another run; nothing if no token may be stale, because then it is the synchronous one."""
    names = ("max_staleness", "sync_every", "partial_rollout")
    is_stale = cfg.ahead.mode == "async" and cfg.ahead.max_staleness > 0
    return {name: getattr(cfg.ahead, name) for name in names} if is_stale else {}


def _fingerprint(cfg, hashes: dict[str, str], data_hash: str) -> dict[str, Any]:
    """What must not change under a resumed run, by content: a renamed directory is the same model."""
    return {
        "student": content.content_hash(cfg.model.student_model),  # its tokenizer included
        "teachers": {
            t.name: {"content": hashes[t.name], "domains": t.domains, "weight": t.share} for t in cfg.teachers
        },
        "data": data_hash,
        "loss": {k: v for k, v in dataclasses.asdict(cfg.loss).items() if k not in _WITHOUT_EFFECT},
        "algorithm": dataclasses.asdict(cfg.gkd) if hasattr(cfg, "gkd") else _staleness(cfg),
        "optim": dataclasses.asdict(cfg.optim),
        "rollout": {k: v for k, v in dataclasses.asdict(cfg.rollout).items() if k not in _WITHOUT_EFFECT},
        "domain_weights": cfg.data.domain_weights,
        "num_steps": cfg.run.num_steps,  # the learning rate depends on it
        "inner_updates": cfg.batch.inner_updates,
        "seed": cfg.run.seed,
    }


def is_due(step: int, every: int, last: int) -> bool:
    """After `step` optimizer steps: at the last one, and at every multiple of `every` above 0."""
    return step == last or (every > 0 and step % every == 0)


@contextmanager
def saves_on_failure(
    run: Run, save_shards: Callable[[Path], None], state: LoopState, metrics: Metrics | None = None
):  # fmt: skip
    """Around what a step does with the weights of `state`. If all ranks stop there, as without a teacher, they save it.

    A checkpoint of other weights would train on a step twice. `metrics` are those of the step that `state` has just finished,
    if its line is not yet written. A run that has no step to save starts afresh, and repeats what it did.
    """
    try:
        yield
    except Exception as error:
        if distributed.was_agreed(error) and state.step > 0:
            say(f"step {state.step + 1} cannot be done: saving step {state.step}, from where the same command goes on")
            if metrics is not None:
                metrics.flush(state.step)
            checkpoint.save(run.run_dir, state, save_shards, run.fingerprint, keep=run.cfg.run.keep_checkpoints)
        raise


# ---- Evaluation and report -------------------------------------------------------------------------------------------


def _asked(run: Run) -> str:
    """What decides held-out scores beside the model, as text: kept scores are good for the same question only."""
    data_hash = run.eval_set.content_hash if run.eval_set else ""
    answers = {k: run.writing_options[k] for k in ("dtype", "max_model_len", "eos_ids", "max_tokens")}  # not what fits
    return json.dumps([data_hash, run.cfg.run.eval_max_prompts, run.cfg.loss.reward_fn, answers])


def evaluate_teachers(run: Run) -> evaluation.Scores:
    """What the teachers score on the held-out prompts; before any engine of this process is built."""
    for spec in run.cfg.teachers:
        if run.eval_prompts and not run.can_write(spec):
            say(
                f"teacher {spec.name}: a scoring server does not write, so its own score, and the recovery, stay unknown; "
                "name a local directory of its model in its entry (`model`)"
            )
    return evaluation.evaluate_teachers(
        [spec for spec in run.cfg.teachers if run.can_write(spec)], run.routes, run.eval_prompts, run.judge,
        run_dir=run.run_dir, hashes={**run.hashes, "asked": _asked(run)}, write=run.write,
    )  # fmt: skip


def evaluate(run: Run, rollout_engine: RolloutEngine, metrics: Metrics, step: int) -> None:
    """Held-out scores of the student after `step` steps, kept for the report; nothing without `--eval_data`."""
    if run.eval_prompts:
        with metrics.timed("eval"):
            scores = evaluation.evaluate_student(rollout_engine, run.eval_prompts, run.judge, metrics)
        evaluation.remember(run.run_dir, step, scores)


def _say_memory(run: Run, ledger: Ledger) -> None:
    found = ledger.compare(run.predicted)
    phases = [f"{name} {r['predicted'] / GIB:.2f}/{r['measured'] / GIB:.2f} GiB" for name, r in found.items()]
    if phases:
        say(f"memory, predicted/measured: {', '.join(phases)}")


def finish(run: Run, student: Student, teacher_scores: evaluation.Scores, ledger: Ledger) -> None:
    """The Hugging Face export, memory as predicted and measured and, with held-out prompts, the report. Collective."""
    _say_memory(run, ledger)
    model_dir = run.run_dir / "model"
    generation_config = student.model.generation_config
    generation_config.eos_token_id = list(run.facts.student.eos_ids)
    export.export_huggingface(
        model_dir, student.model, run.tokenizer, student.named_full_parameters(), generation_config
    )
    say(f"model: {model_dir}")
    path = run.run_dir / "report.json"
    if path.exists() and run.resume_from and checkpoint.load_state(run.resume_from).step == run.cfg.run.num_steps:
        say(report.render_report(json.loads(path.read_text())))  # this process had nothing left to do
        return
    before = evaluation.recall(run.run_dir, 0)
    after = evaluation.recall(run.run_dir, run.cfg.run.num_steps)
    if before is None or after is None:
        return
    result = report.recovery_report(
        before, after, teacher_scores, steps=run.cfg.run.num_steps, wall_s=round(time.time() - run.started, 1)
    )
    if distributed.rank() == 0:
        report.write_report(run.run_dir, result)
    say(report.render_report(result))
