"""Generalized Knowledge Distillation (GKD).

One teacher q, one student p. At each step a coin that all ranks share decides who wrote the
responses: with probability `lmbda` the student itself (on-policy), else the data set, or the
teacher when `--seq_kd` is given. On those responses

    L = 1/N  sum_y sum_t  [ D(p(.|x, y_<t), q(.|x, y_<t))
                            -  sft_alpha * 1[y not the student's] * log p(y_t) ]

N counts the response tokens of all ranks. D is any divergence of `opd/losses.py`: forward KL,
reverse KL, JSD or their skewed forms, exact over the full vocabulary from cached teacher hidden
states, or on a support.

Papers: GKD (arXiv 2306.13649, Algorithm 1); sequence-level distillation (arXiv 1606.07947).

    accelerate launch --config_file ds_configs/accelerate.yaml train_gkd.py --student_model S
    --teacher T \\
        --data train.jsonl --loss jsd --lmbda 0.5 --output_dir runs/gkd

B sequences, S padded length, N loss tokens of a micro-batch, C tokens of a chunk of them, V
vocabulary.
"""

import functools
import json
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

from annotated_types import Ge, Interval
from torch import Tensor

from opd import config, distributed
from opd.colocation import Colocation
from opd.distillation import compare
from opd.inputs.arguments import parse
from opd.inputs.validation import validate_common
from opd.log import say
from opd.mismatch import log_mismatch
from opd.ops.logits import LogitsChunk
from opd.padding import count_loss_tokens
from opd.parity import Parity
from opd.records import checkpoint
from opd.records.files import replace_text
from opd.records.memory_ledger import Ledger
from opd.records.metrics import Metrics
from opd.records.sample_ledger import SampleLedger, sample_rows
from opd.rollout import dataset_rollouts, push
from opd.run.build import (
    build_rollout_engine,
    build_student,
    build_teacher_pool,
    build_teachers,
    restore,
)
from opd.run.context import Run
from opd.run.evaluation import evaluate, evaluate_teachers, finish
from opd.run.prepare import is_due, prepare, saves_on_failure, user_errors
from opd.run.step_log import log_servers, log_step
from opd.student import learning_rate_at
from opd.teachers import TeacherPool
from opd.types import MicroBatch

# ---- Config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GkdConfig:
    lmbda: Annotated[float, Interval(ge=0, le=1)] = config.option(
        0.5, "Probability that a step trains on the student's own responses."
    )
    seq_kd: bool = config.option(
        False,
        "The off-policy responses are written by the teacher, once, and kept in "
        "output_dir/seq_kd.json.",
    )
    seq_kd_temperature: Annotated[float, Ge(0)] = config.option(
        1.0, "Sampling temperature of the teacher's responses; 0 is greedy."
    )
    sft_alpha: Annotated[float, Ge(0)] = config.option(
        0.0, "Weight of the cross-entropy on responses that the student did not write."
    )


@dataclass(frozen=True)
class Config:
    model: config.ModelConfig = field(default_factory=config.ModelConfig)
    teacher: config.TeacherConfig = field(default_factory=config.TeacherConfig)
    data: config.DataConfig = field(default_factory=config.DataConfig)
    rollout: config.RolloutConfig = field(default_factory=config.RolloutConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    gkd: GkdConfig = field(default_factory=GkdConfig)
    batch: config.BatchConfig = field(default_factory=config.BatchConfig)
    optim: config.OptimConfig = field(default_factory=config.OptimConfig)
    run: config.RunConfig = field(default_factory=config.RunConfig)
    teachers: tuple[config.TeacherSpec, ...] = ()
    explicit: frozenset[str] = field(default=frozenset(), compare=False)  # flags that were given

    def validate(self) -> None:
        validate_common(self)
        if len(self.teachers) != 1:
            raise ValueError(
                f"--teacher: train_gkd.py takes one teacher, got {len(self.teachers)}; use "
                "train_mopd.py"
            )
        if self.loss.loss == "reverse_kl_pg":
            raise ValueError(
                "--loss reverse_kl_pg: train_gkd.py minimises a divergence; use train_mopd.py"
            )
        if self.loss.reward_weight > 0:
            raise ValueError(
                f"--reward_weight {self.loss.reward_weight}: no task reward here; use train_mopd.py"
            )
        for flag in ("is_mode", "reject_level"):
            if getattr(self.loss, flag) != "none":
                raise ValueError(
                    f"--{flag} {getattr(self.loss, flag)}: off-policy responses have no sampler; "
                    "use train_mopd.py"
                )
        if self.loss.support == "sampled" and self.gkd.lmbda < 1:
            raise ValueError(
                "--support sampled: an estimate needs tokens that the student sampled; set "
                "--lmbda 1 or --support full"
            )


# ---- The algorithm -------------------------------------------------------------------------------


def token_loss(
    logits: LogitsChunk,
    rows: slice,
    mb: MicroBatch,
    logprobs_N: None,
    *,
    teachers: TeacherPool,
    cfg: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token of a chunk, [C], and what to log about it.

    `rows` are the chunk's tokens among the N.
    """
    seen = compare(logits, rows, mb, head_of=teachers.head, cfg=cfg.loss)
    stats = seen.stats
    loss_C = seen.divergence_C
    if cfg.gkd.sft_alpha > 0:
        off_policy_C = ~mb.at_loss_tokens(mb.on_policy_B)[rows]
        cross_entropy_C = -seen.student_logprobs_C * off_policy_C
        # the mean is over off-policy tokens
        stats["loss/sft"] = cross_entropy_C.detach().masked_fill(~off_policy_C, float("nan"))
        loss_C = loss_C + cfg.gkd.sft_alpha * cross_entropy_C
    stats["loss/total"] = loss_C.detach()
    return loss_C, stats


def is_on_policy(step: int, cfg: Config) -> bool:
    """The coin of a step: the same on every rank and after a resume."""
    return distributed.fold_seed(cfg.run.seed, step, "lmbda") / 2**63 < cfg.gkd.lmbda


def with_teacher_responses(run: Run) -> Run:
    """The run with every prompt's response written by the teacher: once, each rank its share, kept
    under content hashes.
    """
    cfg, spec = run.cfg, run.cfg.teachers[0]
    path = run.run_dir / "seq_kd.json"
    made_from = {
        "teacher": run.hashes[spec.name],
        "data": run.train_set.content_hash,
        "seed": cfg.run.seed,
        "temperature": cfg.gkd.seq_kd_temperature,
        "max_response_tokens": cfg.rollout.max_response_tokens,
    }
    kept = distributed.broadcast_object(json.loads(path.read_text()) if path.exists() else None)
    if kept is None or kept["made_from"] != made_from:
        say(f"teacher {spec.name} writes {len(run.train_set.prompts)} responses")
        with distributed.agree_on_error("writing the teacher's responses"):
            share = run.train_set.prompts[distributed.rank() :: distributed.world_size()]
            log = run.run_dir / "logs" / f"seq_kd_{distributed.rank()}.log"
            samples = run.write(spec, share, log, temperature=cfg.gkd.seq_kd_temperature)
            mine = {
                str(p.prompt_id): sample.token_ids for p, sample in zip(share, samples, strict=True)
            }
        kept = {
            "made_from": made_from,
            "responses": {
                k: v for part in distributed.gather_objects(mine) for k, v in part.items()
            },
        }
        if distributed.rank() == 0:
            replace_text(path, json.dumps(kept))
    prompts = tuple(
        replace(p, target_ids=kept["responses"][str(p.prompt_id)]) for p in run.train_set.prompts
    )
    return replace(run, train_set=replace(run.train_set, prompts=prompts))


# ---- Main ----------------------------------------------------------------------------------------


def main(run: Run) -> None:
    # Setup and Data: `prepare` did both; the configuration, model, prompts and responses of `run`
    # fit together.
    cfg = run.cfg
    metrics = Metrics(run.run_dir, num_steps=cfg.run.num_steps, domains=run.domains)
    ledger, samples = (
        Ledger(run.run_dir / "ledger.jsonl", distributed.rank()),
        SampleLedger(run.run_dir),
    )
    # in a child process that is gone before the engines below exist
    teacher_scores = evaluate_teachers(run)
    if cfg.gkd.seq_kd and cfg.gkd.lmbda < 1:
        run = with_teacher_responses(run)

    # Student and Resume, Rollout engine, Teacher: all on this rank's GPU, each asleep until its
    # phase
    student = build_student(run)
    state = restore(run, student, metrics, samples)
    student.place(states=False, parameters=True)  # its optimizer states make room for the engines
    student.settle()
    rollout_engine = build_rollout_engine(run)
    engines = build_teachers(run)
    colocation = Colocation(
        rollout_engine, student, engines, ledger, spare=run.spare, needs=run.teachers_of
    )
    teachers = build_teacher_pool(run, engines, colocation.turns)
    loss_of_token = functools.partial(token_loss, teachers=teachers, cfg=cfg)
    inner_updates = cfg.batch.inner_updates
    parity = Parity(
        run.micro_batches, cfg.rollout, every=cfg.rollout.parity_every, dtype=student.model.dtype
    )

    # Before the first step: the engine gets the student's weights, and the student its first marks
    with colocation.phase("sync"):
        state.policy_version = push(student, rollout_engine, version=state.step)
    if state.step == 0 and run.eval_prompts:
        with colocation.phase("rollout"):
            evaluate(run, rollout_engine, metrics, 0)
        metrics.flush(0)

    # Loop
    for step in range(state.step, cfg.run.num_steps):
        started = time.perf_counter()
        with colocation.step(step), metrics.timed("step"):
            prompts = run.prompt_batch(step)  # P prompts of this rank
            on_policy = is_on_policy(step, cfg)
            checked = on_policy and parity.is_due(step)

            with saves_on_failure(run, student.save_shards, state):  # no weight has changed yet
                with (
                    colocation.phase("rollout"),
                    metrics.timed("rollout"),
                    distributed.agree_on_error("rollout"),
                ):
                    if on_policy:
                        rollouts = rollout_engine.generate(
                            prompts, step, with_logprobs=checked, on_finished=teachers.hear
                        )
                    else:
                        rollouts = dataset_rollouts(
                            prompts,
                            step,
                            eos_ids=run.facts.student.eos_ids,
                            policy_version=state.policy_version,
                        )

                with (
                    colocation.phase("score"),
                    metrics.timed("score"),
                    distributed.agree_on_error("scoring"),
                ):
                    scores = teachers.score(rollouts)

            micro_batches = run.micro_batches(rollouts, scores)
            # for the sample ledger, once the step is done
            trained_on = sample_rows(rollouts, scores, step=step + 1)
            del scores  # the micro-batches have copied the hidden states
            # over all ranks, before any backward
            num_loss_tokens = count_loss_tokens(micro_batches)

            with colocation.phase("train"), metrics.timed("train"):
                if checked:
                    # is the sampler the student? If not, the run stops here
                    parity.check(student, rollouts, step)
                    scored = [
                        mb.with_old_logprobs(student.logprobs(mb, cfg.rollout.temperature))
                        for mb in micro_batches
                    ]
                    log_mismatch(metrics, scored, cfg.loss, domains=run.domains)
                # each under the student of its moment; the teachers' scores stay
                for update in range(inner_updates):
                    for mb in micro_batches:
                        # a sum over loss tokens
                        out = student.loss(mb, loss_of_token, domains=run.domains)
                        # DeepSpeed will average over ranks
                        scale = distributed.world_size() / num_loss_tokens
                        student.backward(out.loss_sum * scale, last=mb is micro_batches[-1])
                        metrics.merge(out.metrics)
                    learning_rate = learning_rate_at(
                        step + update / inner_updates, cfg.run.num_steps, cfg.optim
                    )
                    grad_norm = student.step(learning_rate)
                teachers.release_head()

            with colocation.phase("sync"), metrics.timed("sync"):
                state.policy_version = push(student, rollout_engine, version=step + 1)

        samples.record(trained_on)
        state.step, state.tokens_seen = step + 1, state.tokens_seen + num_loss_tokens
        metrics.merge(
            {"optim/learning_rate": (learning_rate, 1), "optim/grad_norm": (grad_norm, 1)}
        )
        metrics.add("distill/on_policy_share", float(on_policy))
        seconds = time.perf_counter() - started
        log_step(
            run, metrics, ledger, state, rollouts, num_loss_tokens=num_loss_tokens, seconds=seconds
        )
        log_servers(metrics, teachers, rollout_engine, rollouts, step=state.step, seconds=seconds)
        if is_due(state.step, cfg.run.eval_every, cfg.run.num_steps):
            with colocation.phase("rollout"):
                evaluate(run, rollout_engine, metrics, state.step)
        # before the checkpoint: a step that can be resumed from has its line
        metrics.flush(state.step)
        if is_due(state.step, cfg.run.save_every, cfg.run.num_steps):
            with metrics.timed("checkpoint"):
                checkpoint.save(
                    run.run_dir,
                    state,
                    student.save_shards,
                    run.fingerprint,
                    keep=cfg.run.keep_checkpoints,
                )

    # Finish
    teachers.close()
    colocation.close()
    metrics.close()
    finish(run, student, teacher_scores, ledger)


if __name__ == "__main__":
    with distributed.exit_together():
        with user_errors():  # one line and exit status 2, before a weight is loaded
            cfg = parse(Config)
            run = prepare(cfg, need_response=cfg.gkd.lmbda < 1 and not cfg.gkd.seq_kd)
        main(run)
