"""Named places in the real path where a test may strike, so that what a failure costs is measured
and not believed.

    OPD_FAULT="ledger.written:kill@3"    at the third passing; @1 is the default
    OPD_FAULT_RANK=1                     on that rank; 0 is the default, `all` is every rank

| action | what it does to this process |
|---|---|
| `kill` | SIGKILL, as the kernel does when memory runs out |
| `stop` | SIGSTOP: it lives and never answers |
| `raise` | RuntimeError: what a library or a disk does |
| `exit` | it leaves with status 1, and cleans nothing up |
| `delay=SECONDS` | the thread that came here sleeps so long |

Without OPD_FAULT a point is one look at the environment.
"""

import os
import signal
import time
from dataclasses import dataclass

ACTIONS = ("kill", "stop", "raise", "exit", "delay=SECONDS")

# name -> where it strikes
POINTS = {
    "build.engine": "an engine of the sampler or of a teacher is about to be built",
    "rollout": "before the rollout engine is asked for the responses of a step",
    "rollout.sampled": "the responses of a step are sampled, and nobody has seen them",
    "ahead.issue": "a sample of a coming step is about to be sent to a rollout server",
    "ahead.landed": "a response has come from a rollout server, and nobody knows of it yet",
    "teachers.submit": "a finished response is about to be handed to a served teacher",
    "pool.request": "a request to a pool of servers is about to be sent",
    "pool.answer": "a server's answer has arrived and is not kept yet",
    "score.done": "every response of the step has its teachers' scores",
    "backward": "before the backward pass of a micro-batch, inside a collective region",
    "train.before_step": "all gradients of an optimizer step are there, no weight has changed",
    "train.after_step": "the weights have changed, and no file says so",
    "sync.before": "before the rollout engine gets new weights; the first time is before the "
    "first step",
    "push.paused": "a server is paused for new weights and has not read them",
    "ledger.before_write": "a trained step is not in the sample ledger yet",
    "ledger.written": "a trained step is in the sample ledger, but in neither metrics nor "
    "checkpoint",
    "metrics.flushed": "the line of a step is written, its checkpoint is not",
    "save.begin": "before the temporary directory of a checkpoint is made",
    "save.tmp_made": "the temporary directory is made and empty",
    "save.shards_written": "every rank's shards are written",
    "save.loop_state_written": "the loop state is written",
    "save.files_synced": "all files but the manifest are on the disk",
    "save.before_manifest": "before the manifest is written",
    "save.manifest_half": "half of the manifest is written",
    "save.manifest_written": "the manifest is written and not synced",
    "save.before_rename": "the checkpoint is whole under its temporary name",
    "save.renamed": "the checkpoint has its name",
    "save.before_retention": "before old checkpoints are deleted",
    "save.mid_retention": "an old checkpoint is renamed and not deleted yet",
}

_last = ("", 0)  # the OPD_FAULT seen last, and how often its point was reached under it


@dataclass(frozen=True)
class _Fault:
    point: str
    action: str
    seconds: float  # of a delay
    at: int  # strikes when the point is reached for this time


def check() -> None:
    """Raises ValueError if OPD_FAULT or OPD_FAULT_RANK cannot strike: a typo must not pass for a
    run that survived.
    """
    text, rank = os.environ.get("OPD_FAULT", ""), os.environ.get("OPD_FAULT_RANK", "0")
    if not text:
        return
    fault = _parse(text)
    if fault.point not in POINTS:
        raise ValueError(
            f"OPD_FAULT {text}: no point is called {fault.point!r}; there are {', '.join(POINTS)}"
        )
    if rank != "all" and not rank.isdecimal():
        raise ValueError(f"OPD_FAULT_RANK {rank}: must be a rank or `all`")


def fault_point(name: str) -> None:
    """Strikes if OPD_FAULT says so; otherwise nothing."""
    global _last
    text = os.environ.get("OPD_FAULT", "")
    if not text or text.partition(":")[0] != name:
        return
    if os.environ.get("OPD_FAULT_RANK", "0") not in ("all", os.environ.get("RANK", "0")):
        return
    fault, count = _parse(text), _last[1] if _last[0] == text else 0
    _last = (text, count + 1)
    if count + 1 == fault.at:
        _strike(fault)


def _strike(fault: _Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(1)
        case "delay":
            time.sleep(fault.seconds)
        case "raise":
            raise RuntimeError(f"fault injected at {fault.point}")


def _parse(text: str) -> _Fault:
    point, _, rest = text.partition(":")
    what, at_sign, at = rest.partition("@")
    action, equals, seconds = what.partition("=")
    if action not in {name.partition("=")[0] for name in ACTIONS} or bool(equals) != (
        action == "delay"
    ):
        raise ValueError(
            f"OPD_FAULT {text}: no action is called {what!r}; write POINT:ACTION[@N], "
            f"{', '.join(ACTIONS)}"
        )
    if at_sign and not (at.isdecimal() and int(at) > 0):
        raise ValueError(f"OPD_FAULT {text}: @{at}: must be a whole number of at least 1")
    if equals and not seconds.replace(".", "", 1).isdecimal():
        raise ValueError(f"OPD_FAULT {text}: delay={seconds}: must be seconds")
    return _Fault(point, action, float(seconds or 0), int(at or 1))
