"""The flags of asynchronous rollouts, a group beside those of `opd/config.py`."""

from dataclasses import dataclass
from typing import Literal

from opd.options import NonNegativeInt, PositiveFloat, PositiveInt, option


@dataclass(frozen=True)
class AsyncConfig:
    """Rollouts from servers that write while the trainer trains."""

    mode: Literal["sync", "async"] = option(
        "sync",
        "sync: rollouts and training take turns on the same devices. async: rollout servers write "
        "ahead.",
    )
    max_staleness: NonNegativeInt = option(
        1,
        "How many versions older than the weights in training a token may be. 0 is the synchronous "
        "run, on servers.",
        fingerprinted="algorithm",
    )
    sync_every: PositiveInt = option(
        1, "Steps between pushes of the weights to the rollout servers.", fingerprinted="algorithm"
    )
    partial_rollout: bool = option(
        True,
        "At a push, responses that are being written go on under the new weights; otherwise they "
        "start again.",
        fingerprinted="algorithm",
    )
    rollout_servers: list[str] = option(
        ["auto"],
        "URLs of rollout servers; auto starts them on this machine and stops them at the end.",
    )
    rollout_replicas: PositiveInt = option(
        1, "Rollout servers to start with --rollout_servers auto."
    )
    rollout_gpus: str = option(
        "",
        "GPUs of the rollout servers that are started, such as 4,5,6,7: not the trainer's. "
        "Default: the visible ones.",
    )
    logprob_servers: list[str] = option(
        [], "URLs of log-prob servers for --old_logprobs server; auto starts them on this machine."
    )
    logprob_replicas: PositiveInt = option(
        1, "Log-prob servers to start with --logprob_servers auto."
    )
    logprob_gpus: str = option(
        "", "GPUs of the log-prob servers that are started. Default: the visible ones."
    )
    max_inflight: PositiveInt = option(256, "Responses in flight at one rollout server, per rank.")
    rollout_timeout_s: PositiveFloat = option(1800.0, "How long one response may take, s.")
    rollout_wait_s: PositiveFloat = option(
        60.0, "How long a step waits while no server answers, before the run saves and stops, s."
    )
    weights_dir: str = option(
        "",
        "Where weights pass to servers: a folder that all of them see. Default: one of its own in "
        "shared memory.",
    )
