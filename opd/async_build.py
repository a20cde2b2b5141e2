"""The asynchronous rollout engine of a run: its servers, the folder through which weights reach them, and the pushes."""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from opd import distributed, weight_push, weight_store
from opd.async_rollout import AsyncRolloutEngine, push_from_rank_0
from opd.metrics import say
from opd.protocols import TOKEN_VARIABLE
from opd.replicas import serving
from opd.run import Run

LEASE_S = 60.0  # a server whose trainer died in a push goes on after so long
PUSH_DEADLINE_S = 600.0  # of one server


def is_async(cfg) -> bool:
    """Whether a script's Config asks for rollouts that run ahead."""
    return hasattr(cfg, "ahead") and cfg.ahead.mode == "async"


def build_async_engine(run: Run, *, wants_logprobs: Callable[[int], bool]) -> AsyncRolloutEngine:
    """The engine of this rank. Rank 0 starts the servers, if they are to be started, and pushes. Collective."""
    ahead, stack = run.cfg.ahead, ExitStack()
    root = Path(ahead.weights_dir) if ahead.weights_dir else weight_store.default_root(run.run_dir)
    token, fence, urls = None, 0, list(ahead.rollout_servers)
    with distributed.agree_on_error("starting the rollout servers"):
        if distributed.rank() == 0:
            token = os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
            fence = time.time_ns() // 1000  # a trainer that was started later has the larger one
            if urls == ["auto"]:
                urls = _start_servers(run, root, stack)
    token, fence, urls = distributed.broadcast_object((token, fence, urls))
    with distributed.agree_on_error("connecting to the rollout servers"):
        engine = AsyncRolloutEngine(
            urls, run.cfg.rollout, ahead, eos_ids=run.facts.student.eos_ids, seed=run.cfg.run.seed,
            vocab=run.facts.student.vocab_size, num_steps=run.cfg.run.num_steps, prompts_of=run.prompt_batch,
            wants_logprobs=wants_logprobs, push=push_from_rank_0(_pusher(urls, root, fence, token, ahead.partial_rollout)),
            token=token,
        )  # fmt: skip
        engine.on_close = stack
        if run.resume_from is not None:
            engine.load(run.resume_from)
    return engine


def _start_servers(run: Run, root: Path, stack: ExitStack) -> list[str]:
    """Servers that end with this process, whatever ends it."""
    if not run.cfg.ahead.weights_dir:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
    options = run.engine_options
    extra = ["--max_model_len", str(options["max_model_len"])]
    extra += ["--enforce_eager"] if run.cfg.rollout.enforce_eager else []
    replicas = stack.enter_context(
        serving(
            run.cfg.model.student_model, replicas=run.cfg.ahead.rollout_replicas, name="rollout", protocol="rollout",
            weights_dir=root, dtype=options["dtype"], kv_cache_gib=run.cfg.rollout.rollout_kv_cache_gib, extra=extra,
            log_dir=run.run_dir / "logs" / "rollout_servers",
        )
    )  # fmt: skip
    say(f"rollout servers: {', '.join(replica.url for replica in replicas)}")
    return [replica.url for replica in replicas]


def _pusher(
    urls: list[str], root: Path, fence: int, token: str, keeps: bool
) -> Callable[[Iterable[tuple[str, Tensor]], int], dict[str, float]]:
    def publish_and_push(named_parameters: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        published = weight_store.publish(root, named_parameters, version, fence)
        report = weight_push.push(
            urls, version, fence, token, mode="keep" if keeps else "abort", lease_s=LEASE_S, deadline_s=PUSH_DEADLINE_S
        )
        return {"bytes": published.bytes, "pause_s": max(replica.pause_s for replica in report.replicas if replica.ok)}

    return publish_and_push
