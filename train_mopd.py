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

    deepspeed train_mopd.py --student_model S --teacher math=T1 --teacher code=T2 \\
        --data train.jsonl --output_dir runs/first

B sequences, S padded length, N loss tokens of a micro-batch, C tokens of a chunk of them, V
vocabulary.
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd import config, distributed
from opd.distillation import compare, policy_stats
from opd.inputs import rewards
from opd.inputs.arguments import parse
from opd.inputs.async_rules import validate_ahead
from opd.inputs.validation import validate_common
from opd.lora_config import LoraConfig
from opd.losses import (
    accepted_sequences,
    distillation_advantage,
    importance_weights,
    policy_gradient_loss,
)
from opd.mismatch import corrects
from opd.ops.logits import LogitsChunk
from opd.padding import count_loss_tokens
from opd.privilege import PrivilegeConfig
from opd.rollout import with_rewards
from opd.run.context import Judge, Run
from opd.run.loop import start
from opd.run.prepare import prepare, user_errors
from opd.student import learning_rate_at
from opd.teachers import TeacherPool
from opd.types import MicroBatch, Rollout

# ---- Config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    model: config.ModelConfig = field(default_factory=config.ModelConfig)
    teacher: config.TeacherConfig = field(default_factory=config.TeacherConfig)
    privilege: PrivilegeConfig = field(default_factory=PrivilegeConfig)
    data: config.DataConfig = field(default_factory=config.DataConfig)
    rollout: config.RolloutConfig = field(default_factory=config.RolloutConfig)
    ahead: config.AsyncConfig = field(default_factory=config.AsyncConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    batch: config.BatchConfig = field(default_factory=config.BatchConfig)
    optim: config.OptimConfig = field(default_factory=config.OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
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

    `rows` are the chunk's tokens among the N; `logprobs_N` are the student's of the moment.
    """
    seen = compare(logits, rows, mb, head_of=teachers.head, cfg=cfg)
    sampler_C = mb.at_loss_tokens(mb.rollout_logprobs_BS)[rows]
    old_N = None if cfg.old_logprobs == "rollout" else mb.at_loss_tokens(mb.old_logprobs_BS)
    old_C = sampler_C if old_N is None else old_N[rows]
    clips = {name: getattr(cfg, name) for name in ("clip_low", "clip_high", "dual_clip")}
    policy_gradient = functools.partial(
        policy_gradient_loss, seen.student_logprobs_C, old_C, **clips
    )
    task_C = cfg.reward_weight * mb.at_loss_tokens(mb.task_advantages_B)[rows]

    if cfg.loss == "reverse_kl_pg":
        log_p_C, log_q_C = seen.student_logprobs_C, seen.teacher_logprobs_C
        distill_C = distillation_advantage(log_p_C, log_q_C, clip=cfg.advantage_clip)
        loss_C = policy_gradient(distill_C + task_C)
    else:
        loss_C = seen.divergence_C
        if cfg.reward_weight > 0:
            task_loss_C = policy_gradient(task_C)
            seen.stats["loss/task"] = task_loss_C.detach()
            loss_C = loss_C + task_loss_C

    weights_C, trainer_C = torch.ones_like(sampler_C), None
    if corrects(cfg):  # student / sampler; with an old policy of its own old / sampler
        trainer_N = logprobs_N if old_N is None else old_N
        weights_C, trainer_C = correction_weights(mb, trainer_N, cfg)[rows], trainer_N[rows]
        loss_C = weights_C * loss_C
    stats = policy_stats(seen, sampler_C, old_C, trainer_C, weights_C, cfg)
    return loss_C, {**seen.stats, **stats, "loss/total": loss_C.detach()}


def correction_weights(mb: MicroBatch, trainer_N: Tensor, cfg: config.LossConfig) -> Tensor:
    """w_is, [N], from trainer over sampler: what sampled is not quite, or no longer, what trains.

    Without `--is_mode` and `--reject_level` every weight is 1.
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
    cfg, num_updates = run.cfg, run.cfg.batch.inner_updates
    loop = start(run)  # engines on this rank's GPU, each asleep until its phase; resumed
    student, teachers = loop.student, loop.teachers
    loss_of_token = functools.partial(token_loss, teachers=teachers, cfg=cfg.loss)

    for step in range(loop.state.step, cfg.run.num_steps):
        with loop.step(step):
            prompts = run.prompt_batch(step)  # P prompts of this rank, mixed domains

            with loop.phase("rollout"):  # the student writes
                rollouts = loop.generate(prompts)
                if cfg.loss.reward_weight > 0:
                    rollouts = add_task_rewards(rollouts, run.judge, cfg.rollout.num_generations)

            rollouts = loop.balance(rollouts)  # about equal work for every rank

            with loop.phase("score"):  # each response's own teachers read it
                scores = teachers.score(rollouts)

            micro_batches = loop.micro_batches(rollouts, scores)
            del scores  # the micro-batches have copied the hidden states
            num_loss_tokens = count_loss_tokens(micro_batches)  # over all ranks, before a backward

            with loop.phase("train"):  # the student moves toward them
                micro_batches = loop.with_old_policy(micro_batches)
                for update in range(num_updates):  # scores stay, the student they meet does not
                    for mb in micro_batches:
                        out = student.loss(mb, loss_of_token)  # a sum over loss tokens
                        scale = distributed.world_size() / num_loss_tokens  # DeepSpeed averages
                        student.backward(out.loss_sum * scale, last=mb is micro_batches[-1])
                        loop.record(mb, out, update)
                    progress = step + update / num_updates
                    learning_rate = learning_rate_at(progress, cfg.run.num_steps, cfg.optim)
                    grad_norm = student.step(learning_rate)

            loop.trained(num_loss_tokens, learning_rate, grad_norm)
            with loop.phase("sync"):  # the sampler gets the new weights
                loop.push()
        loop.after_step()  # metrics; evaluation and checkpoint, when they are due
    loop.finish()


if __name__ == "__main__":
    with distributed.exit_together():
        with user_errors():  # one line and exit status 2, before a weight is loaded
            run = prepare(parse(Config))
        main(run)
