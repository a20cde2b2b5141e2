"""SIGTERM and Ctrl-C ask a run to stop: it saves the last whole step first.

A signal only leaves word here. The ranks look for it together, since some may have had none:
`deepspeed` passes it to one rank after another. Work that holds no collective operation is left at
once (`interruptible`), so a long rollout does not outlast the grace of a scheduler. A second
Ctrl-C ends the run as ever. Until `listen` a signal does what it does anywhere.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from opd import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on the Ctrl-C that its ranks have had themselves: that is the same one.
SAME_SECONDS = 1.0

_asked, _moment = 0, 0.0  # the first signal, and when it came
_is_interruptible = False
_arrived = -1  # readable from the instant on at which a signal arrives, in any thread


class Asked(RuntimeError):
    """Work was left because the run was asked to stop."""


def listen() -> None:
    """From now on a signal asks, and does not kill. To be called in the main thread."""
    global _arrived
    _arrived, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def unlisten() -> None:
    """Signals do what they did: there is nothing more to save."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _on_signal(number: int, frame) -> None:
    global _asked, _moment
    if not _asked:
        _asked, _moment = number, time.monotonic()
    elif number == signal.SIGINT and time.monotonic() - _moment > SAME_SECONDS:
        raise KeyboardInterrupt
    if _is_interruptible:
        _leave_work()


def _leave_work() -> NoReturn:
    global _is_interruptible
    _is_interruptible = False
    raise Asked(f"asked to stop by {signal.Signals(_asked).name}")


def has_arrived() -> bool:
    """Whether this process has had a signal, though its main thread may not know yet."""
    return bool(_asked) or (_arrived >= 0 and bool(select.select([_arrived], [], [], 0)[0]))


@contextmanager
def interruptible(may: bool = True) -> Iterator[None]:
    """Work in here is left as soon as a signal comes. It must hold no collective operation, and
    stand inside `agree_on_error`, by which all ranks hear of it.
    """
    global _is_interruptible
    _is_interruptible = may
    try:
        if may and _asked:
            _leave_work()
        yield
    finally:
        _is_interruptible = False


def signal_here() -> int:
    """The first signal that this rank has had; 0 for none."""
    return _asked


def asked_of_all() -> int:
    """The signal that any rank has had; 0 for none. Collective."""
    return int(distributed.all_reduce([float(_asked)], "max")[0])


def end_by(number: int) -> NoReturn:
    """Ends this process as the signal would have, once all ranks are here. Collective."""
    with suppress(RuntimeError):  # a rank that has gone is no reason to stay
        distributed.barrier()
    unlisten()
    signal.signal(number, signal.SIG_DFL)
    raise distributed.Stop(f"stopped by {signal.Signals(number).name}", status=-number)
