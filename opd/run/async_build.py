"""The asynchronous rollout engine of a run: its servers, the folder through which weights reach
them, and the pushes.
"""

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import torch

from opd import distributed
from opd.async_rollout import AsyncRolloutEngine, push_from_rank_0
from opd.clients.health import Limits
from opd.clients.logprob_servers import LogprobServers
from opd.clients.protocols import TOKEN_VARIABLE
from opd.clients.rollout_servers import RolloutServers
from opd.log import say, warn
from opd.run.context import Run
from opd.run.prepare import user_errors
from opd.servers.http_service import read_token
from opd.servers.server_processes import PUSHED, serving
from opd.weights import store
from opd.weights.keeper import WeightKeeper

CHECK_SECONDS = 30.0  # for a server to say what it is


@dataclass(frozen=True)
class _Fleet:
    """What all ranks know of the servers."""

    rollout: list[str]
    logprob: list[str]
    token: str

    @property
    def roles(self) -> dict[str, list[str]]:
        """Role -> URLs.

        The log-prob servers come first: the old policy must not be older than the sampler.
        """
        roles = {"log-prob servers": self.logprob, "rollout servers": self.rollout}
        return {role: urls for role, urls in roles.items() if urls}


def build_async_engine(run: Run) -> AsyncRolloutEngine:
    """The engine of this rank. Rank 0 starts the servers, if they are to be started, and pushes.

    Collective.
    """
    cfg, ahead, stack, fleet, keeper = run.cfg, run.cfg.ahead, ExitStack(), None, None
    root = Path(ahead.weights_dir) if ahead.weights_dir else store.default_root(run.run_dir)
    _check_ahead(run, root)
    with distributed.agree_on_error("starting the servers"):
        if distributed.rank() == 0:
            if not ahead.weights_dir:
                distributed.at_end(partial(shutil.rmtree, root, ignore_errors=True))
            token = os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
            fleet = _Fleet(_rollout_urls(run, root, stack), _logprob_urls(run, root, stack), token)
            fence = time.time_ns() // 1000  # a trainer that was started later has the larger one
            mode = "keep" if ahead.partial_rollout else "abort"
            keeper = WeightKeeper(
                fleet.roles, root, fence, token, mode=mode, wait_s=ahead.rollout_wait_s
            )
            stack.callback(keeper.close)
    fleet = distributed.broadcast_object(fleet)
    with distributed.agree_on_error("connecting to the servers"):
        servers = RolloutServers(
            fleet.rollout,
            cfg.rollout,
            ahead,
            eos_ids=run.stop_ids,
            vocab=run.facts.student.vocab_size,
            token=fleet.token,
        )
        logprob_servers = None
        if fleet.logprob:
            limits = Limits(wait_s=ahead.rollout_wait_s, max_inflight=ahead.max_inflight)
            logprob_servers = LogprobServers(
                fleet.logprob, fleet.token, limits, temperature=cfg.rollout.temperature
            )
        engine = AsyncRolloutEngine(
            servers,
            cfg.rollout,
            ahead,
            seed=cfg.run.seed,
            num_steps=cfg.run.num_steps,
            prompts_of=run.prompt_batch,
            push=push_from_rank_0(keeper and keeper.push),
            logprob_servers=logprob_servers,
        )
        engine.on_close = stack
    return engine


def _check_ahead(run: Run, root: Path) -> None:
    """Finds what the user has to mend about servers and folder, on rank 0, and says it in one line.

    Collective.
    """
    problem = None
    if distributed.rank() == 0:
        ahead = run.cfg.ahead
        try:
            read_token()
            if ahead.weights_dir:
                _claim(root)
            for role in ("rollout", "logprob"):
                if getattr(ahead, f"{role}_gpus") and not torch.cuda.device_count():
                    raise ValueError(
                        f"--{role}_gpus {getattr(ahead, f'{role}_gpus')}: there is no GPU here"
                    )
                urls = [url for url in getattr(ahead, f"{role}_servers") if url != "auto"]
                _check_servers(
                    f"--{role}_servers", urls, PUSHED[role], run.engine_options["max_model_len"]
                )
        except ValueError as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    with user_errors():
        if problem is not None:
            raise ValueError(problem)


def _claim(root: Path) -> None:
    try:
        store.claim(root)
    except ValueError as error:
        raise ValueError(f"--weights_dir {error}") from None


class _Unreachable(ValueError):
    """A server that is not there; it may be on its way back."""


def _check_servers(flag: str, urls: Sequence[str], protocol: str, tokens: int) -> None:
    """ValueError for one that is wrong, or if none is there.

    One that is missing is warned of: it is pushed to when it comes.
    """
    missing = []
    for url in urls:
        try:
            _check_server(f"{flag} {url}", url, protocol, tokens)
        except _Unreachable as error:
            missing.append(error)
    if missing and len(missing) == len(urls):
        raise missing[0]
    for error in missing:
        warn(str(error))


def _check_server(flag: str, url: str, protocol: str, tokens: int) -> None:
    """ValueError unless it is a server of that kind that takes our token, and prompt and response
    of so many tokens.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/version", headers=headers, timeout=CHECK_SECONDS, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Unreachable(f"{flag}: cannot be reached: {error}; start it first") from None
    if answer.status_code == 401 or not token:
        raise ValueError(
            f"{flag}: {TOKEN_VARIABLE} is not the token that it was started with; export the same "
            "one here"
        )
    try:
        found, context = answer.json()["protocol"], answer.json().get("max_model_len", tokens)
    except (ValueError, KeyError, TypeError):
        found, context = f"status {answer.status_code}", tokens
    if found != protocol:
        raise ValueError(f"{flag}: it is no server of this kind ({found}, not {protocol})")
    if context < tokens:
        raise ValueError(
            f"{flag}: it takes {context} tokens, and --max_prompt_tokens and --max_response_tokens "
            f"are {tokens} together; start it with --max_model_len {tokens}"
        )


def _rollout_urls(run: Run, root: Path, stack: ExitStack) -> list[str]:
    """The run's rollout servers; those that are started here end with this process, whatever ends
    it.
    """
    ahead, options = run.cfg.ahead, run.engine_options
    if ahead.rollout_servers != ["auto"]:
        return list(ahead.rollout_servers)
    extra = ["--max_model_len", str(options["max_model_len"])]
    extra += ["--enforce_eager"] if run.cfg.rollout.enforce_eager else []
    extra += ["--trust_remote_code"] if options["trust_remote_code"] else []
    return _start_servers(
        run,
        root,
        stack,
        "rollout",
        replicas=ahead.rollout_replicas,
        gpus=ahead.rollout_gpus,
        extra=extra,
        kv_cache_gib=run.cfg.rollout.rollout_kv_cache_gib,  # `auto` is theirs to size
        tensor_parallel=run.cfg.rollout.rollout_tensor_parallel_size,
    )


def _logprob_urls(run: Run, root: Path, stack: ExitStack) -> list[str]:
    """Likewise the log-prob servers, if there are any."""
    ahead, options = run.cfg.ahead, run.engine_options
    if ahead.logprob_servers != ["auto"]:
        return list(ahead.logprob_servers)
    extra = ["--max_model_len", str(options["max_model_len"])]
    extra += ["--attn_implementation", run.cfg.model.attn_implementation]
    extra += ["--trust_remote_code"] if options["trust_remote_code"] else []
    return _start_servers(
        run,
        root,
        stack,
        "logprob",
        replicas=ahead.logprob_replicas,
        gpus=ahead.logprob_gpus,
        extra=extra,
    )


def _start_servers(
    run: Run, root: Path, stack: ExitStack, role: str, *, gpus: str, **options
) -> list[str]:
    if torch.cuda.device_count() and not gpus:
        warn(f"--{role}_gpus: not given, so the {role} servers share the trainer's GPUs")
    replicas = stack.enter_context(
        serving(
            run.cfg.model.student_model,
            name=role,
            protocol=role,
            weights_dir=root,
            dtype=run.engine_options["dtype"],
            log_dir=run.run_dir / "logs" / f"{role}_servers",
            gpus=[name for name in gpus.split(",") if name],
            **options,
        )
    )
    say(f"{role} servers: {', '.join(replica.url for replica in replicas)}")
    return [replica.url for replica in replicas]
