"""Server processes of one model on this machine: started, awaited, started again, ended.

`serving` is what tests and launchers use:

    with serving("models/math", replicas=2) as replicas:
        print([replica.url for replica in replicas])

A replica speaks one of four protocols. "binary" is `opd.servers.scoring_server` and "json" is
vLLM's own OpenAI server: teachers. Those of PUSHED are servers of the student, whose weights a
trainer pushes through `weights_dir`: they are ready before they have any. Each listens on the
loopback interface, on a port that the kernel chooses, in a process group of which nothing is left
when its starter ends.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil

from opd import processes
from opd.clients import wire
from opd.clients.protocols import LOGPROB, ROLLOUT, TOKEN_VARIABLE
from opd.clients.served_model import score_call
from opd.clients.transport import Call
from opd.config import GIB
from opd.distributed import resolve_dtype
from opd.engines.vllm_process import ENVIRONMENT

ServerProtocol = Literal["binary", "json", "rollout", "logprob"]
# Servers of the student: protocol -> what they say at /version.
PUSHED = {"rollout": ROLLOUT, "logprob": LOGPROB}

START_SECONDS = 1800.0  # a large model reads its weights from a slow disk
FIRST_ANSWER_SECONDS = 120.0  # vLLM compiles at its first question
STOP_SECONDS = 5.0  # from SIGTERM to the end of all that a server has started; then SIGKILL
REAP_SECONDS = 30.0  # for the kernel to take a killed process away, on a machine that is busy
LOOK_AGAIN_SECONDS = 0.1
LOG_LINES = 15  # of a server that failed

# Of a rank's environment, or for one engine in this process: nothing that a server of its own
# should hear.
NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_SERVER_DEV_MODE",
    "OPD_FAULT",
)
LOOPBACK_ONLY = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


class StartError(RuntimeError):
    """A server that did not come up; with the end of its log."""


# Two tokens that every vocabulary has, and the one log-probability that follows.
SCORE_PROBE = wire.Question([2], [3], payload="sampled", support_k=0, vocab=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What all replicas of a model have in common."""

    model: str
    name: str
    protocol: ServerProtocol = "binary"
    tensor_parallel: int = 1
    dtype: str = "auto"
    max_logprobs: int = 1024
    kv_cache_gib: float | Literal["auto"] = "auto"  # a number for vLLM's own server
    weights_dir: str | Path | None = None  # where a trainer publishes what servers of PUSHED serve
    extra: Sequence[str] = ()  # flags for the server itself

    @property
    def dtype_name(self) -> str:
        """vLLM's own "auto" is bfloat16 even for float32 files on a CPU."""
        return str(resolve_dtype(self.dtype)).removeprefix("torch.")

    @property
    def kv_cache_bytes(self) -> int:
        return int(self.kv_cache_gib * GIB)

    def command(self, port: int = 0) -> list[str]:
        """Of a server at `port`, 0: the kernel chooses.

        Ours come last, so that no extra flag opens what is closed.
        """
        program = PROGRAMS[self.protocol]
        options = {"--model": "model", "--dtype": "dtype_name", **program.flags}
        values = {flag: getattr(self, option) for flag, option in options.items()}
        assert None not in values.values(), f"protocol {self.protocol}: {values}"
        flags = [word for flag, value in values.items() for word in (flag, str(value))]
        command = [sys.executable, "-m", program.module, *flags, *program.switches, *self.extra]
        return [*command, "--host", "127.0.0.1", "--port", str(port)]

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """This process's, closed and cut to `gpus`; vLLM's server takes the token of ours as its
        API key.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
        env |= {**ENVIRONMENT, **LOOPBACK_ONLY}
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), env.get("PYTHONPATH")])
        )
        if token := env.get(TOKEN_VARIABLE):
            env["VLLM_API_KEY"] = token
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return {k: v for k, v in env.items() if k not in NOT_INHERITED}


def _asked_to_score(options: ServerOptions) -> Call:
    return score_call(options.name, options.protocol, SCORE_PROBE)


def _asked_what_it_is(options: ServerOptions) -> Call:
    """It has computed before it listened, and serves nothing before the first push."""
    expected = PUSHED[options.protocol]

    def read(answer: bytes) -> None:
        if json.loads(answer).get("protocol") != expected:
            raise ValueError(f"it does not speak {expected}: {answer[:200]!r}")

    return Call("/version", read=read)


@dataclass(frozen=True, slots=True)
class _Program:
    """The server that speaks a protocol."""

    module: str
    flags: dict[str, str]  # beside model and dtype: its flag -> which of the options
    probe: Callable[[ServerOptions], Call]  # whoever answers it is ready
    switches: tuple[str, ...] = ()


PROGRAMS: dict[ServerProtocol, _Program] = {
    "binary": _Program(
        "opd.servers.scoring_server",
        {"--name": "name", "--max_support_k": "max_logprobs", "--kv_cache_gib": "kv_cache_gib"},
        _asked_to_score,
    ),
    "json": _Program(
        # the CPU package of vllm 0.32 has no metadata, without which `vllm serve` fails
        "vllm.entrypoints.openai.api_server",
        {
            "--served-model-name": "name",
            "--max-logprobs": "max_logprobs",
            "--kv-cache-memory-bytes": "kv_cache_bytes",
            "--tensor-parallel-size": "tensor_parallel",
        },
        _asked_to_score,
        ("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
    ),
    "rollout": _Program(
        "opd.servers.rollout_server",
        {
            "--name": "name",
            "--weights_dir": "weights_dir",
            "--kv_cache_gib": "kv_cache_gib",
            "--tensor_parallel": "tensor_parallel",
        },
        _asked_what_it_is,
    ),
    "logprob": _Program(
        "opd.servers.logprob_server", {"--weights_dir": "weights_dir"}, _asked_what_it_is
    ),
}


@dataclass(slots=True)
class ServerProcess:
    """One server process.

    `url` is known once it answers, and stays what it is when the server is started again.
    """

    options: ServerOptions
    process: subprocess.Popen
    log: Path
    gpus: Sequence[str] = ()  # all that are visible if none is named
    log_start: int = (
        0  # bytes of its log that others wrote, of an earlier run or the server that it stands for
    )
    url: str | None = field(default=None)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the server and all that it has started; returns when it is gone."""
        processes.end(self.process.pid, 0)
        self.process.wait(REAP_SECONDS)

    def stop(self) -> None:
        """Ends it in order, and by force what does not end within END_SECONDS."""
        stop_all([self])

    def restart(self) -> None:
        """Starts the same server again, with the port and the GPUs that it had, without waiting for
        it.

        What lives of the old one is ended first. The new one knows nothing of it: a server of
        PUSHED is stale until the next push. To be called in a thread that lives as long as the
        server is needed (`processes.spawn`).
        """
        self.stop()
        port = urllib.parse.urlsplit(self.url).port if self.url else None
        self.log_start, self.process = _start_server(self.options, self.log, self.gpus, port or 0)

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self._read_log().splitlines()[-LOG_LINES:])

    def _read_log(self) -> str:
        """What this process wrote, and not one before it: an old URL would be waited
        for in vain.
        """
        with suppress(FileNotFoundError), self.log.open("rb") as file:  # somebody tidied up
            file.seek(self.log_start)
            return file.read().decode(errors="replace")
        return ""

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Returns when it has answered a question, and `url` is set.

        StartError if it ends before, or takes longer.
        """
        deadline = time.monotonic() + seconds
        error: str | None = "no time was given"
        while time.monotonic() < deadline:
            if not self.alive:
                raise StartError(
                    self._failure(
                        f"ended with status {self.process.returncode} before it was ready"
                    )
                )
            error = self._try(min(FIRST_ANSWER_SECONDS, max(1.0, deadline - time.monotonic())))
            if error is None:
                return
            time.sleep(LOOK_AGAIN_SECONDS)
        raise StartError(self._failure(f"was not ready within {seconds:g} s: {error}"))

    def is_ready(self, seconds: float = FIRST_ANSWER_SECONDS) -> bool:
        """Whether it answers a question now, within `seconds`; then `url` is set."""
        return self.alive and self._try(seconds) is None

    def _try(self, seconds: float) -> str | None:
        """Asks a question once: why it is not ready, or None if it is, and `url` is set."""
        url = self._find_url()
        if url is None:
            return "it does not listen yet"
        try:
            self._ask(url, seconds)
        except (
            OSError,
            ValueError,
            HTTPException,
        ) as error:  # a refused connection, 4xx and 5xx, a bad or torn answer
            return str(error)
        self.url = url
        return None

    def _failure(self, what: str) -> str:
        return (
            f"server of {self.options.name} ({self.options.model}) {what}; the end of "
            f"{self.log}:\n{self.last_lines()}"
        )

    def _find_url(self) -> str | None:
        """vLLM does not say which port the kernel chose, and its server process listens on no
        other.
        """
        if self.options.protocol != "json":
            found = re.search(r"^serving .* at (http://\S+)$", self._read_log(), re.M)
            return found and found[1]
        with suppress(psutil.Error):  # it ends while we look
            for connection in psutil.Process(self.process.pid).net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    return f"http://{connection.laddr.ip}:{connection.laddr.port}"
        return None

    def _ask(self, url: str, seconds: float) -> None:
        """A question of two tokens, or what it is.

        OSError or ValueError for everything but a right answer.
        """
        call = PROGRAMS[self.options.protocol].probe(self.options)
        headers = {"Content-Type": call.content_type}
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        # no proxy stands before this machine itself
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(url + call.path, call.body, headers)
        with direct.open(request, timeout=seconds) as answer:
            call.read(answer.read())


def start_replica(options: ServerOptions, log: Path, gpus: Sequence[str] = ()) -> ServerProcess:
    """Starts a server on `gpus` (all that are visible if none is named), without waiting for it."""
    log_start, process = _start_server(options, log, gpus, 0)
    return ServerProcess(options, process, log, tuple(gpus), log_start)


def _start_server(
    options: ServerOptions, log: Path, gpus: Sequence[str], port: int
) -> tuple[int, subprocess.Popen]:
    """(bytes that the log held before, the process).

    A log is appended to: it tells what led to a death.
    """
    written = log.stat().st_size if log.exists() else 0
    return written, processes.spawn(options.command(port), log=log, env=options.environment(gpus))


def stop_all(replicas: Sequence[ServerProcess]) -> None:
    """Ends them together: whatever they do, it takes less than 10 s.

    Those that have ended already are no error.
    """
    deadline = time.monotonic() + STOP_SECONDS
    for replica in replicas:
        if replica.alive:
            replica.process.send_signal(signal.SIGTERM)
    for replica in replicas:
        with suppress(subprocess.TimeoutExpired):
            replica.process.wait(max(0.0, deadline - time.monotonic()))
    for replica in replicas:
        group = replica.process.pid
        while (
            processes.members(group)
            and replica.process.poll() is not None
            and time.monotonic() < deadline
        ):
            time.sleep(LOOK_AGAIN_SECONDS)  # its guard ends the rest, in order
        replica.kill()


@contextmanager
def serving(
    model: str,
    *,
    replicas: int = 1,
    gpus: Sequence[str] = (),
    log_dir: Path | None = None,
    start_seconds: float = START_SECONDS,
    name: str | None = None,
    **options,
) -> Iterator[list[ServerProcess]]:
    """`replicas` servers of `model` that answer; at the end they are gone, whatever was raised.

    `gpus` are dealt out, `tensor_parallel` to each. `options` are those of `ServerOptions`. Raises
    StartError.
    """
    settings = ServerOptions(model=model, name=name or Path(model).name, **options)
    share = settings.tensor_parallel
    assert not gpus or len(gpus) >= replicas * share, (
        f"{len(gpus)} GPUs for {replicas} replicas of {share}"
    )
    started: list[ServerProcess] = []
    with (
        TemporaryDirectory(prefix="opd_serve_") if log_dir is None else _made(log_dir) as directory
    ):
        try:
            for index in range(replicas):
                log = Path(directory, f"server_{index}.log")
                started.append(
                    start_replica(settings, log, gpus[index * share : (index + 1) * share])
                )
            for replica in started:
                replica.wait_until_ready(start_seconds)
            yield started
        finally:
            stop_all(started)


@contextmanager
def _made(directory: Path) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    yield directory
