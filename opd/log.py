"""What a program tells its user: console and log, messages of one line, and no secret in any of
them.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.distributed import rank


def one_line(error: Exception) -> str:
    """The message of a library's exception, cut to what fits into a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def cut(value: Any) -> str:
    """A value as Python writes it, cut to 80 characters."""
    return f"{value!r:.80}"


logger = logging.getLogger("opd")


def say(message: str) -> None:
    """Tells the user something outside the steps: rank 0's console and log."""
    if rank() == 0:
        print(message, flush=True)
        logger.info(message)


def warn(message: str) -> None:
    """Tells the user what concerns this rank, whichever it is: console and log."""
    # In one piece: launchers start `python -u`, and `print` would write the end of the line after
    # another rank's warning.
    print(f"warning: rank {rank()}: {message}\n", end="", file=sys.stderr, flush=True)
    logger.warning(message)


def warn_once(message: str) -> None:
    """Tells the user what concerns all ranks alike, once: rank 0's console and log."""
    if rank() == 0:
        warn(message)


class _QuietLogger(logging.Logger):
    """A logger that never writes to the console and always reaches the root's log file.

    vLLM, DeepSpeed and transformers each install a stream handler of their own and stop
    propagation, whenever they are first imported; the warning of a library without a handler would
    go to stderr.
    """

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:
        if not _writes_to_console(hdlr):
            super().addHandler(hdlr)


class _RedactedFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _writes_to_console(handler: logging.Handler) -> bool:
    console = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and any(
        handler.stream is stream for stream in console
    )


def setup_logging(run_dir: Path) -> Path:
    """Sends every logger and warning of this rank to `logs/rank_N.log`; returns it.

    Exceptions still reach stderr.

    Call it early on every rank: loggers made before it are cleaned once, those made after it never
    reach the console.
    """
    path = Path(run_dir) / "logs" / f"rank_{rank()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    known = [
        log for log in logging.Logger.manager.loggerDict.values() if isinstance(log, logging.Logger)
    ]
    for other in (root, *known):
        for handler in [
            h for h in other.handlers if _writes_to_console(h) or getattr(h, "of_run", False)
        ]:
            other.removeHandler(handler)
        other.propagate = True
    file = logging.FileHandler(path, mode="a", encoding="utf-8")
    file.of_run = True  # a second call moves the log instead of doubling it
    file.setFormatter(_RedactedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request
    logging.setLoggerClass(_QuietLogger)
    logging.captureWarnings(True)
    _hide_progress_bars()
    return path


def _hide_progress_bars() -> None:
    """Bars of the Hugging Face libraries go to stderr past every logger."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()  # and those of huggingface_hub


# Narrower than for the environment: max_response_tokens and domain_key are no secrets.
_SECRET_FLAG = re.compile(
    r"(^|[_-])((api|access|private|auth)[_-]?key|token|secret|password)$", re.I
)


_SECRET_QUERY = re.compile(r"([?&][\w-]*(?:token|key|secret|password)=)[^&\s]+", re.I)


_URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]+@", re.I)


_HIDDEN = "***"


_SHORTEST_SECRET = 8  # a shorter value is a word that other text may hold by chance


def redact(text: str) -> str:
    """Hides user-info and secrets in URLs, and the values of this process's secret environment
    variables.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and re.search(
            r"(TOKEN|KEY|SECRET|PASSWORD)$", name, re.I
        ):
            text = text.replace(value, _HIDDEN)
    return _SECRET_QUERY.sub(rf"\1{_HIDDEN}", _URL_USER.sub(rf"\1{_HIDDEN}@", text))


def redact_argv(argv: Sequence[str]) -> list[str]:
    """`redact`, and the values of flags whose name says that they are secret (`--hf_token X`,
    `API_KEY=X`).
    """
    shown, hide = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET_FLAG.search(name))
        if hide and not argument.startswith("--"):
            shown.append(_HIDDEN)
        else:
            shown.append(f"{name}={_HIDDEN}" if secret and equals else redact(argument))
        hide = secret and not equals and argument.startswith("-")
    return shown


def redact_config(value: Any, name: str = "") -> Any:
    """A copy of a configuration without secrets."""
    if isinstance(value, dict):
        return {k: redact_config(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(v, name) for v in value]
    if isinstance(value, str) and value:
        return _HIDDEN if _SECRET_FLAG.search(name) else redact(value)
    return value
