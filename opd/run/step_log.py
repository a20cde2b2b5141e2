"""What a step leaves behind: throughput, memory, what the rollouts looked like, and what servers
did for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from opd import distributed
from opd.async_rollout import AsyncRolloutEngine
from opd.clients.health import Stats
from opd.config import GIB
from opd.inputs.teacher_prompts import own_prompts
from opd.log import warn
from opd.records.files import write_rollouts
from opd.records.memory_ledger import Ledger
from opd.records.metrics import Metrics, memory
from opd.rollout import RolloutEngine
from opd.run.context import Run
from opd.teachers import TeacherPool
from opd.types import LoopState, Rollout


def log_step(
    run: Run,
    metrics: Metrics,
    ledger: Ledger,
    state: LoopState,
    rollouts: Sequence[Rollout],
    *,
    num_loss_tokens: int,
    seconds: float,
) -> None:
    """Throughput, memory, and what the rollouts of the step looked like."""
    for r in rollouts:
        for suffix in ("", f"/{r.prompt.domain}"):
            metrics.add(f"rollout/response_tokens{suffix}", len(r.response_ids))
            metrics.add(f"rollout/truncated{suffix}", float(r.finish_reason == "length"))
            if r.reward is not None:
                metrics.add(f"rollout/reward{suffix}", r.reward)
        metrics.add("rollout/prompt_tokens", len(r.prompt.token_ids))
        metrics.add("staleness/policy_lag", state.step - 1 - r.policy_version)
        metrics.add_max("staleness/policy_lag_max", state.step - 1 - r.policy_version)
        if r.old_policy is not None:
            metrics.add("staleness/old_policy_lag", state.step - 1 - r.old_policy.version)
            metrics.add("logprob/entropy", sum(r.old_policy.entropy), len(r.old_policy.entropy))
    own = sum(len(r.response_ids) for r in rollouts)
    for domain in run.domains:
        metrics.add(
            f"distill/token_share/{domain}",
            sum(len(r.response_ids) for r in rollouts if r.prompt.domain == domain),
            own,
        )
    metrics.add("optim/loss_tokens", num_loss_tokens)
    metrics.add("perf/tokens_per_second", num_loss_tokens / seconds)
    metrics.add("perf/samples_per_second", len(rollouts) * distributed.world_size() / seconds)
    for key, value in memory().items():
        metrics.add_max(key, value)
    for phase, peak in ledger.take_peaks().items():
        metrics.add_max(f"mem/{phase}_gib", peak / GIB)
    every = run.cfg.run.rollout_every
    if every and ((state.step - 1) % every == 0 or state.step == run.cfg.run.num_steps):
        _log_samples(run, metrics, state.step, rollouts)


class UnsharedTokens:
    """Tokens of the responses that a teacher of their domain does not share with the student.

    The teacher scores them by what stands at their id in its own vocabulary, which says nothing.
    """

    def __init__(self, run: Run):
        self.run, self._warned = run, False

    def log(self, metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
        """Their share, of the domains that have such tokens; the first one is told of."""
        for r in rollouts:
            teacher_of = self.run.unshared.get(r.prompt.domain)
            if teacher_of is None:
                continue
            found = [token for token in r.response_ids if token in teacher_of]
            for suffix in ("", f"/{r.prompt.domain}"):
                metrics.add(f"rollout/unshared_tokens{suffix}", len(found), len(r.response_ids))
            if found and not self._warned:
                self._warned = True
                token = self.run.tokenizer.convert_ids_to_tokens(found[0])
                warn(
                    f"sample {r.sample_id}: its response has {token!r} ({found[0]}), a token that "
                    f"teacher {teacher_of[found[0]]} does not share, so its score there says "
                    "nothing; rollout/unshared_tokens has the share of such tokens"
                )


def log_own_prompts(
    run: Run, metrics: Metrics, rollouts: Sequence[Rollout], overlong: Mapping[str, int]
) -> None:
    """How many responses teachers with prompts of their own have read behind one, and its length.

    `overlong` counts those that a function made too long.
    """
    for name in own_prompts(run.cfg):
        mine = [r.prompt for r in rollouts if name in dict(run.routes[r.prompt.domain])]
        for prompt in mine:
            metrics.add(f"teacher/own_prompt/{name}", float(name in prompt.teacher_ids))
            metrics.add(f"teacher/prompt_tokens/{name}", len(prompt.ids_for(name)))
        if name in run.feedback:
            metrics.add(f"teacher/overlong_prompt/{name}", overlong[name], len(mine))


def _log_samples(run: Run, metrics: Metrics, step: int, rollouts: Sequence[Rollout]) -> None:
    metrics.histogram("rollout/response_tokens", [len(r.response_ids) for r in rollouts], step)
    rows = [
        {
            "prompt_id": r.prompt.prompt_id,
            "domain": r.prompt.domain,
            "source": r.source,
            "prompt": run.tokenizer.decode(r.prompt.token_ids),
            **_own_texts(run, r),
            "response": run.tokenizer.decode(r.response_ids),
            "answer": r.prompt.answer,
            "finish_reason": r.finish_reason,
            "policy_version": r.policy_version,
            "reward": r.reward,
        }
        for r in rollouts[: run.cfg.run.rollout_samples]
    ]
    write_rollouts(run.run_dir, step, rows)
    for index, row in enumerate(rows):
        metrics.text(
            f"rollout/sample_{index}", f"[{row['domain']}] {row['prompt']}\n{row['response']}", step
        )


def _own_texts(run: Run, rollout: Rollout) -> dict[str, dict[str, str]]:
    """What its teachers have read in place of the prompt, if one did."""
    own = rollout.prompt.teacher_ids
    texts = {name: run.tokenizer.decode(ids) for name, ids in own.items()}
    return {"teacher_prompts": texts} if texts else {}


def log_servers(
    metrics: Metrics,
    teachers: TeacherPool,
    engine: RolloutEngine | AsyncRolloutEngine,
    rollouts: Sequence[Rollout],
    *,
    step: int,
    seconds: float,
) -> None:
    """What servers did in a step of so many seconds, if there are any.

    Counts are sums over the ranks.
    """
    for name, teacher in teachers.served.items():
        _log_pool(metrics, "teacher/{}/" + name, teacher.pool.take_stats(), seconds)
        metrics.add_max(f"teacher/waited_s/{name}", teachers.waited_s[name])
    if isinstance(engine, AsyncRolloutEngine):
        _log_ahead(metrics, engine, seconds)
        _log_lags(metrics, step, rollouts)
        if engine.logprob_servers is not None:
            _log_pool(metrics, "logprob/{}", engine.logprob_servers.pool.take_stats(), seconds)
        metrics.add("perf/trainer_idle", engine.waited_s + sum(teachers.waited_s.values()), seconds)
        metrics.add("perf/push_share", engine.push_s, seconds)


def _log_pool(metrics: Metrics, key_of: str, stats: Stats, seconds: float) -> None:
    """What a pool's servers did; `key_of` makes a key of a name."""
    counts = {
        "requests": stats.requests,
        "retries": stats.retries,
        "failovers": stats.failovers,
        "ejections": stats.ejections,
        "failures": stats.failures.total(),
        "tokens_per_second": stats.tokens / seconds,
    }
    for key, value in counts.items():
        metrics.add(key_of.format(key), value, 1 / distributed.world_size())
    metrics.add(key_of.format("bytes_per_token"), stats.bytes_received, stats.tokens)
    metrics.add_max(key_of.format("inflight"), stats.most_inflight)
    if stats.latencies:
        for percentile in ("p50", "p95", "p99"):
            latency_s = float(np.percentile(stats.latencies, int(percentile[1:])))
            metrics.add_max(key_of.format(f"latency_{percentile}_s"), latency_s)


def _log_ahead(metrics: Metrics, engine: AsyncRolloutEngine, seconds: float) -> None:
    """How far the rollout servers are ahead, what they wrote, and how long the trainer waited for
    them.
    """
    stats, (lengths, idle) = engine.servers.pool.take_stats(), engine.servers.flow.take()
    metrics.add_max("rollout/waited_s", engine.waited_s)
    metrics.add("rollout/ready", engine.ready)
    metrics.add("rollout/in_flight", engine.in_flight)
    metrics.add("rollout/sampled_tokens", sum(lengths), len(lengths))
    metrics.add("rollout/tokens_per_second", sum(lengths) / seconds, 1 / distributed.world_size())
    metrics.add("rollout/idle", idle)
    metrics.add(
        "rollout/server_retries", stats.retries + stats.failovers, 1 / distributed.world_size()
    )
    for key, value in engine.push_metrics.items():
        metrics.add_max(f"rollout/push_{key}", value)


def _log_lags(metrics: Metrics, step: int, rollouts: Sequence[Rollout]) -> None:
    """How many versions older than the weights in training the tokens are: shares of the step, and
    a histogram.
    """
    spans = [
        span
        for r in rollouts
        for span in r.policy_spans or ((r.policy_version, 0, len(r.response_ids)),)
    ]
    lags = np.repeat(
        [step - 1 - version for version, _, _ in spans], [end - start for _, start, end in spans]
    )
    (largest,) = distributed.all_reduce([int(lags.max(initial=0))], "max")
    for lag in range(int(largest) + 1):
        metrics.add(f"staleness/token_share/{lag}", int((lags == lag).sum()), len(lags))
    metrics.histogram("staleness/policy_lag", lags.tolist(), step)
