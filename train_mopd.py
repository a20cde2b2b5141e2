"""Multi-teacher On-Policy Distillation (MOPD).

The student p writes its own answers y ~ p(.|x). The domain of the prompt x names its teacher q (or
several, with weights w_i that sum to 1), the teacher says what it would have written at each of
those very tokens, and the student moves toward it:

    L = 1/N  sum_{y ~ p}  sum_t  w_is(t) * [ sum_i w_i D(p(.|x, y_<t), q_i(.|x, y_<t))
                                             -  alpha * A_task(y) * log p(y_t) ]

N counts the response tokens of all ranks. D is by default the reverse KL over the full vocabulary,
computed from cached teacher hidden states; `--loss reverse_kl_pg` replaces the bracket by the
policy gradient of the same reverse KL,

    -( sg[log q(y_t) - log p(y_t)] + alpha * A_task(y) ) * log p(y_t)

Papers: on-policy distillation, GKD (arXiv 2306.13649); routed teachers with a policy gradient,
MiMo-V2-Flash (arXiv 2601.02780 Eq. 5-9). Student, its sampler and all teachers share the same GPUs
and are awake in turn.

    deepspeed train_mopd.py --student_model S --teacher math=T1 --teacher code=T2 --data train.jsonl
    --output_dir runs/first

B sequences, S padded length, N loss tokens of a micro-batch, C tokens of a chunk of them, V
vocabulary.
"""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from opd import config, distributed
from opd.colocation import Colocation
from opd.distillation import compare
from opd.inputs import rewards
from opd.inputs.arguments import parse
from opd.inputs.async_rules import validate_ahead
from opd.inputs.validation import validate_common
from opd.losses import (
    MAX_LOG_RATIO,
    accepted_sequences,
    distillation_advantage,
    importance_weights,
    policy_gradient_loss,
)
from opd.mismatch import corrects, log_mismatch
from opd.ops.logits import LogitsChunk
from opd.padding import count_loss_tokens
from opd.parity import Parity
from opd.records import checkpoint
from opd.records.memory_ledger import Ledger
from opd.records.metrics import Metrics
from opd.records.sample_ledger import SampleLedger, sample_rows
from opd.rollout import push, with_rewards
from opd.run.build import (
    build_rollout_engine,
    build_student,
    build_teacher_pool,
    build_teachers,
    restore,
)
from opd.run.context import Judge, Run
from opd.run.evaluation import evaluate, evaluate_teachers, finish
from opd.run.prepare import is_due, prepare, saves_on_failure, user_errors
from opd.run.step_log import log_servers, log_step
from opd.student import learning_rate_at
from opd.teachers import TeacherPool
from opd.types import MicroBatch, Rollout

# ---- Config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    model: config.ModelConfig = field(default_factory=config.ModelConfig)
    teacher: config.TeacherConfig = field(default_factory=config.TeacherConfig)
    data: config.DataConfig = field(default_factory=config.DataConfig)
    rollout: config.RolloutConfig = field(default_factory=config.RolloutConfig)
    ahead: config.AsyncConfig = field(default_factory=config.AsyncConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    batch: config.BatchConfig = field(default_factory=config.BatchConfig)
    optim: config.OptimConfig = field(default_factory=config.OptimConfig)
    run: config.RunConfig = field(default_factory=config.RunConfig)
    teachers: tuple[config.TeacherSpec, ...] = ()
    explicit: frozenset[str] = field(default=frozenset(), compare=False)  # flags that were given

    def validate(self) -> None:
        validate_common(self)
        validate_ahead(self)


# ---- The algorithm -------------------------------------------------------------------------------


def token_loss(
    logits: LogitsChunk,
    rows: slice,
    mb: MicroBatch,
    logprobs_N: Tensor | None,
    *,
    teachers: TeacherPool,
    cfg: config.LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token of a chunk, [C], and what to log about it.

    `rows` are the chunk's tokens among the N.
    """
    seen = compare(logits, rows, mb, head_of=teachers.head, cfg=cfg)
    stats = seen.stats
    sampler_C = mb.at_loss_tokens(mb.rollout_logprobs_BS)[rows]
    old_logprobs_C = (
        sampler_C if cfg.old_logprobs == "rollout" else mb.at_loss_tokens(mb.old_logprobs_BS)[rows]
    )
    task_advantages_C = cfg.reward_weight * mb.at_loss_tokens(mb.task_advantages_B)[rows]
    policy_gradient = functools.partial(
        policy_gradient_loss,
        seen.student_logprobs_C,
        old_logprobs_C,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
    )

    if cfg.old_logprobs == "server":
        stats["mismatch/old_policy_gap"] = (seen.student_logprobs_C.detach() - old_logprobs_C).abs()
    if cfg.clip_low is not None:
        low, high = 1 - cfg.clip_low, 1 + (cfg.clip_high or cfg.clip_low)
        ratio_C = (seen.student_logprobs_C.detach() - old_logprobs_C).exp()
        stats["distill/ratio_clip_fraction"] = ((ratio_C < low) | (ratio_C > high)).float()

    if cfg.loss == "reverse_kl_pg":
        advantages_C = distillation_advantage(
            seen.student_logprobs_C, seen.teacher_logprobs_C, clip=cfg.advantage_clip
        )
        stats["distill/advantage_abs"] = advantages_C.abs()
        limit = float("inf") if cfg.advantage_clip is None else cfg.advantage_clip
        stats["distill/clip_fraction"] = (stats["distill/k1"].abs() > limit).float()
        loss_C = policy_gradient(advantages_C + task_advantages_C)
    else:
        loss_C = seen.divergence_C
        if cfg.reward_weight > 0:
            task_loss_C = policy_gradient(task_advantages_C)
            stats["loss/task"] = task_loss_C.detach()
            loss_C = loss_C + task_loss_C

    if corrects(cfg):
        # With an old policy of its own, the PPO ratio covers current / old, and the weights old /
        # sampler.
        trainer_N = (
            logprobs_N if cfg.old_logprobs == "rollout" else mb.at_loss_tokens(mb.old_logprobs_BS)
        )
        weights_C = correction_weights(mb, trainer_N, cfg)[rows]
        stats["mismatch/weight_mean"], stats["mismatch/weight_zero_fraction"] = (
            weights_C,
            (weights_C == 0).float(),
        )
        if cfg.is_mode != "none":
            stats["mismatch/weight_cut_fraction"] = (weights_C >= cfg.is_high).float()
        stats["mismatch/clamp_fraction"] = (
            (trainer_N[rows] - sampler_C).abs() > MAX_LOG_RATIO
        ).float()
        loss_C = weights_C * loss_C
    stats["loss/total"] = loss_C.detach()
    return loss_C, stats


def correction_weights(mb: MicroBatch, trainer_N: Tensor, cfg: config.LossConfig) -> Tensor:
    """w_is, [N], from trainer over sampler: what sampled is not quite, or no longer, the model that
    trains.
    """
    trio = (mb.from_loss_tokens(trainer_N), mb.rollout_logprobs_BS, mb.loss_mask_BS)
    weights_BS = importance_weights(
        *trio, mode=cfg.is_mode, level=cfg.is_level, low=cfg.is_low, high=cfg.is_high
    )
    accepted_B = accepted_sequences(
        *trio, level=cfg.reject_level, low=cfg.reject_low, high=cfg.reject_high
    )
    return mb.at_loss_tokens(weights_BS * accepted_B[:, None])


def add_task_rewards(rollouts: list[Rollout], judge: Judge, group_size: int) -> list[Rollout]:
    """A reward per response and its advantage over the other responses to the same prompt."""
    scores = [judge(r.prompt, r.response_ids) for r in rollouts]
    return with_rewards(rollouts, scores, rewards.group_relative_advantages(scores, group_size))


# ---- Main ----------------------------------------------------------------------------------------


def main(run: Run) -> None:
    # Setup and Data: `prepare` did both; the configuration, models, prompts and routes of `run` fit
    # together.
    cfg = run.cfg
    metrics = Metrics(run.run_dir, num_steps=cfg.run.num_steps, domains=run.domains)
    ledger, samples = (
        Ledger(run.run_dir / "ledger.jsonl", distributed.rank()),
        SampleLedger(run.run_dir),
    )
    # in a child process that is gone before the engines below exist
    teacher_scores = evaluate_teachers(run)

    # Student and Resume, Rollout engine, Teachers: all on this rank's GPU, each asleep until its
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
    loss_of_token = functools.partial(token_loss, teachers=teachers, cfg=cfg.loss)
    # The correction compares the sampler with an old policy of its own, or else with the student of
    # the moment.
    old_policy, temperature = cfg.loss.old_logprobs, cfg.rollout.temperature
    logprob_temperature = temperature if corrects(cfg.loss) and old_policy == "rollout" else None
    inner_updates = cfg.batch.inner_updates
    parity = Parity(
        run.micro_batches, cfg.rollout, every=cfg.rollout.parity_every, dtype=student.model.dtype
    )

    def save_parts(directory: Path) -> None:
        """This rank's part of a checkpoint: its shards, and responses of coming steps if some are
        written already.
        """
        student.save_shards(directory)
        rollout_engine.save(directory)

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
            prompts = run.prompt_batch(step)  # P prompts of this rank, mixed domains
            checked = parity.is_due(step)

            with saves_on_failure(run, save_parts, state):  # no weight has changed yet
                with (
                    colocation.phase("rollout"),
                    metrics.timed("rollout"),
                    distributed.agree_on_error("rollout"),
                ):
                    rollouts = rollout_engine.generate(  # P * G responses
                        prompts,
                        step,
                        with_logprobs=run.reads_logprobs or checked,
                        on_finished=teachers.hear,
                    )
                    fresh = rollout_engine.fresh(rollouts, step) if checked else []
                    if cfg.loss.reward_weight > 0:
                        rollouts = add_task_rewards(
                            rollouts, run.judge, cfg.rollout.num_generations
                        )

                with (
                    colocation.phase("score"),
                    metrics.timed("score"),
                    distributed.agree_on_error("scoring"),
                ):
                    scores = teachers.score(rollouts)  # by each rollout's own domain

            micro_batches = run.micro_batches(rollouts, scores)
            # for the sample ledger, once the step is done
            trained_on = sample_rows(rollouts, scores, step=step + 1)
            del scores  # the micro-batches have copied the hidden states
            # over all ranks, before any backward
            num_loss_tokens = count_loss_tokens(micro_batches)

            with colocation.phase("train"), metrics.timed("train"):
                if checked:
                    # is the sampler the student? If not, the run stops here
                    parity.check(student, fresh, step)
                if old_policy == "server":  # the rollouts brought it
                    log_mismatch(metrics, micro_batches, cfg.loss, domains=run.domains)
                elif old_policy == "recompute" or (checked and logprob_temperature is None):
                    micro_batches = [
                        mb.with_old_logprobs(student.logprobs(mb, temperature))
                        for mb in micro_batches
                    ]
                    log_mismatch(metrics, micro_batches, cfg.loss, domains=run.domains)
                # each under the student of its moment; the teachers' scores stay
                for update in range(inner_updates):
                    for mb in micro_batches:
                        out = student.loss(
                            mb,
                            loss_of_token,
                            domains=run.domains,
                            logprob_temperature=logprob_temperature,
                        )
                        # DeepSpeed will average over ranks
                        scale = distributed.world_size() / num_loss_tokens
                        student.backward(out.loss_sum * scale, last=mb is micro_batches[-1])
                        metrics.merge(out.metrics)
                        # the loss has computed them, before any update
                        if update == 0 and out.logprobs_N is not None:
                            log_mismatch(
                                metrics,
                                [mb.with_old_logprobs(out.logprobs_N)],
                                cfg.loss,
                                domains=run.domains,
                            )
                    learning_rate = learning_rate_at(
                        step + update / inner_updates, cfg.run.num_steps, cfg.optim
                    )
                    grad_norm = student.step(learning_rate)
                teachers.release_head()

            samples.record(trained_on)
            state.step, state.tokens_seen = step + 1, state.tokens_seen + num_loss_tokens

            with (
                saves_on_failure(run, save_parts, state, metrics),
                colocation.phase("sync"),
                metrics.timed("sync"),
            ):
                state.policy_version = push(student, rollout_engine, version=state.step)

        metrics.merge(
            {"optim/learning_rate": (learning_rate, 1), "optim/grad_norm": (grad_norm, 1)}
        )
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
                    run.run_dir, state, save_parts, run.fingerprint, keep=cfg.run.keep_checkpoints
                )

    # Finish
    rollout_engine.close()
    teachers.close()
    colocation.close()
    metrics.close()
    finish(run, student, teacher_scores, ledger)


if __name__ == "__main__":
    with distributed.exit_together():
        with user_errors():  # one line and exit status 2, before a weight is loaded
            run = prepare(parse(Config))
        main(run)
