"""Real vLLM servers of tiny models, on loopback ports, that tests start, kill and stop with
everything they started.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

START_S = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VllmServer:
    """One process group. `ready` waits until it answers; `stop` leaves nothing behind."""

    def __init__(self, model: Path, name: str, environment: dict[str, str], *options: str):
        self.name, self.port = name, free_port()
        self.log = tempfile.NamedTemporaryFile(prefix=f"vllm-{name}-", suffix=".log", mode="w+")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            name,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--max-logprobs",
            "64",
            "--kv-cache-memory-bytes",
            str(32 << 20),
            "--enforce-eager",
            "--dtype",
            "float32",
            "--no-enable-prefix-caching",
            "--disable-uvicorn-access-log",
            *options,
        ]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> "VllmServer":
        end = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None, f"{self.name} ended:\n{self._tail()}"
            assert time.monotonic() < end, f"{self.name} did not start:\n{self._tail()}"
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to the server and all that it started."""
        children = (
            psutil.Process(self.process.pid).children(recursive=True)
            if self.process.poll() is None
            else []
        )
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        psutil.wait_procs(children, timeout=30)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self.kill()
        self.log.close()

    def _tail(self) -> str:
        return "".join(Path(self.log.name).read_text().splitlines(keepends=True)[-30:])


def start_two_by_two(
    wanted: Sequence[tuple[Path, str]], environment: dict[str, str]
) -> list[VllmServer]:
    """Servers of (model, name), in that order: more than two at once only wait for each other on a
    small machine.
    """
    servers: list[VllmServer] = []
    try:
        for start in range(0, len(wanted), 2):
            servers += [
                VllmServer(model, name, environment) for model, name in wanted[start : start + 2]
            ]
            for server in servers[start:]:
                server.ready()
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers
