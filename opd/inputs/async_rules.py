"""What is wrong with a configuration of asynchronous rollouts, before anything else is read: one
ValueError names flag, value and remedy. Nothing is asked of a server.
"""

from opd.config import AsyncConfig, is_async
from opd.inputs.past import check_past_of_async
from opd.inputs.teacher_rules import is_http
from opd.inputs.validation import check_off_policy


def validate_ahead(config) -> None:
    """What `train_mopd.py --mode async` needs beside what both scripts check."""
    if not is_async(config):
        return
    check_past_of_async(config.teachers)
    _check_schedule(config.ahead, config.run.eval_every)
    _check_servers_are_distinct(config.ahead)
    _check_gpus("rollout", config.ahead, each=config.rollout.rollout_tensor_parallel_size)
    _check_gpus("logprob", config.ahead, each=1)
    _check_folder(config.ahead)
    if (config.loss.old_logprobs == "server") != bool(config.ahead.logprob_servers):
        raise ValueError(
            "--old_logprobs server and --logprob_servers need each other; give URLs, or auto"
        )
    if config.ahead.max_staleness > 0:
        check_off_policy(
            config.loss,
            f"--max_staleness {config.ahead.max_staleness}",
            why="a policy gradient on stale responses is off-policy",
            unseen="what the student has learned since",
            unseen_by=("server",),
            others="recompute or server",
        )


def _check_schedule(ahead: AsyncConfig, eval_every: int) -> None:
    every = ahead.sync_every
    if ahead.max_staleness < every - 1:
        raise ValueError(
            f"--max_staleness {ahead.max_staleness}: with --sync_every {every} the step before a "
            f"push is {every - 1} versions behind; allow as many"
        )
    if eval_every % every:
        raise ValueError(
            f"--eval_every {eval_every}: the servers that are evaluated get weights every "
            f"--sync_every {every} steps; take a multiple of that"
        )


def _check_servers_are_distinct(ahead: AsyncConfig) -> None:
    if not ahead.rollout_servers:
        raise ValueError("--rollout_servers: give URLs, or auto")
    roles: dict[str, str] = {}  # URL -> the flag that names it
    for flag, urls in (
        ("--rollout_servers", ahead.rollout_servers),
        ("--logprob_servers", ahead.logprob_servers),
    ):
        if urls == ["auto"]:
            continue
        if "auto" in urls:
            raise ValueError(f"{flag}: auto stands alone; give URLs, or auto")
        for url in (url.rstrip("/").lower() for url in urls):
            if not is_http(url):
                raise ValueError(f"{flag} {url}: not an http(s) URL; write http://HOST:PORT")
            if roles.get(url) == flag:
                raise ValueError(f"{flag} {url}: it stands there twice")
            if url in roles:
                raise ValueError(
                    f"{flag} {url}: it is also one of {roles[url]}; a server has one role"
                )
            roles[url] = flag


def _check_gpus(role: str, ahead: AsyncConfig, *, each: int) -> None:
    """The GPUs of the servers that are started here, `each` for one of them."""
    gpus = getattr(ahead, f"{role}_gpus")
    if not gpus:
        return
    if getattr(ahead, f"{role}_servers") != ["auto"]:
        raise ValueError(
            f"--{role}_gpus {gpus}: only for servers that are started here, --{role}_servers auto"
        )
    needed = getattr(ahead, f"{role}_replicas") * each
    names = [name for name in gpus.split(",") if name]
    if len(names) < needed or len(set(names)) < len(names):
        raise ValueError(f"--{role}_gpus {gpus}: {needed} GPUs are needed, each named once")


def _check_folder(ahead: AsyncConfig) -> None:
    own = {*ahead.rollout_servers, *ahead.logprob_servers} - {"auto"}
    if own and not ahead.weights_dir:
        raise ValueError(
            "--weights_dir is required with servers of your own: the folder that they were started "
            "with"
        )
