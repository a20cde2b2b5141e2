"""Published weights from a trainer to the processes of a server, without a folder that both see.

The trainer is rank 0 of a group that is made for one transfer to one server and gone after it; the
server's workers are the others. NCCL carries the bytes where the server computes on GPUs, gloo on
CPUs; the code is one. What travels are the files that `weight_store` published, piece by piece.
What they hold is said before, in the control request: names, shapes, dtypes and hashes, as JSON and
behind the token. So a server checks them against its model before it allocates anything, and
believes a file when its hash is right; nothing is unpickled.

The server connects to the address that the request came from, and both ends listen on the addresses
of that connection only. Every wait has a deadline, after which a group is given up: whoever dies
leaves the other side with an error.
"""

import hashlib
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

from opd.clients.protocols import is_loopback
from opd.faults import fault_point
from opd.weights.offer import Backend, Offer, data_bytes, entries_of
from opd.weights.store import open_own, read_manifest

# of a file: what the trainer holds beside its own memory, and what one wait is for
CHUNK_BYTES = 64 << 20
MOST_WORKERS = 1024
STALL_SECONDS = 60.0  # for the other side to come, and for one piece to arrive
POLL_SECONDS = 0.001
CONNECT_SECONDS = 10.0


def check_interface(urls: Sequence[str], environ: Mapping[str, str]) -> None:
    """ValueError if NCCL in this process would listen to the network for servers that only this
    machine reaches.

    "auto" stands for servers that will be started on this machine.
    """
    here = [url for url in urls if url == "auto" or is_loopback(urlsplit(url).hostname)]
    if (
        here
        and torch.cuda.is_available()
        and environ.get("NCCL_SOCKET_IFNAME", "").lstrip("=") != "lo"
    ):
        raise ValueError(
            f"--weight_transfer broadcast: NCCL would listen on other interfaces than {here[0]}: "
            f"set NCCL_SOCKET_IFNAME=lo, "
            "or use --weight_transfer directory"
        )


# ---- The group -----------------------------------------------------------------------------------


class _Group:
    """A trainer and a server's workers, for one transfer.

    When one closes it, the others' waits fail.
    """

    def __init__(
        self, store: TCPStore, rank: int, size: int, backend: Backend, address: str, seconds: float
    ):
        self.seconds = seconds
        make = {"gloo": _gloo, "nccl": _nccl}[backend]
        self._group: Any = make(store, rank, size, address, timedelta(seconds=seconds))
        self._options = BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0

    def broadcast(self, values: Tensor, over: threading.Event | None = None) -> None:
        """From rank 0 to all.

        TimeoutError if it takes too long, RuntimeError if another has gone or `over` is set.
        """
        work, deadline = (
            self._group.broadcast([values], self._options),
            time.monotonic() + self.seconds,
        )
        try:
            while not work.is_completed():
                if over is not None and over.is_set():
                    raise RuntimeError("called off")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a piece of the weights took more than {self.seconds:g} s")
                time.sleep(POLL_SECONDS)
            # raises what went wrong; with NCCL, orders the stream behind it
            work.wait(timedelta(seconds=self.seconds))
        finally:
            # an error's traceback must not keep the sockets open: the other side waits for their
            # end
            work = None

    def close(self) -> None:
        """Gives up what is under way. gloo closes its sockets with the last reference, NCCL when it
        is told.
        """
        if self._group is not None:
            self._group.abort()
            self._group = None


def _gloo(
    store: TCPStore, rank: int, size: int, address: str, timeout: timedelta
) -> ProcessGroupGloo:
    """Listens on `address` alone, whatever GLOO_SOCKET_IFNAME says."""
    options = ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
    return ProcessGroupGloo(store, rank, size, options)


def _nccl(store: TCPStore, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    """NCCL takes its interface from NCCL_SOCKET_IFNAME, once in a process (`check_interface`)."""
    from torch.distributed import ProcessGroupNCCL  # not in a build for CPUs

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # `_Group.broadcast` gives up before
    before = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = (
        "0"  # or a lost server would end the trainer's process
    )
    try:
        return ProcessGroupNCCL(store, rank, size, options)
    finally:
        del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        if before is not None:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = before


# ---- The trainer's side --------------------------------------------------------------------------


@contextmanager
def sending(
    root: Path,
    version: int,
    fence: int,
    *,
    address: str,
    workers: int,
    backend: Backend,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Sends a published version to the workers that come while the block runs; it is given what a
    request must say of it.

    `address` is this process's, as the server sees it. At the end of the block nothing listens any
    more, whatever happened in it; a block that ends well is one whose server has said that it has
    everything. ValueError if nothing of the kind is published, or can be sent, or if sending has
    failed and so the block.
    """
    if backend not in ("gloo", "nccl") or not 1 <= workers <= MOST_WORKERS:
        raise ValueError(
            f"the server says that {workers} processes receive by {backend[:40]!r}: not known here"
        )
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError(
            "the server receives by NCCL, and this process has no GPU: use --weight_transfer "
            "directory"
        )
    directory, manifest = read_manifest(root, version, fence)
    entries = [entry for entry in manifest["files"] if entry["file"].endswith(".safetensors")]
    shards = [
        {
            "size": entry["size"],
            "sha256": entry["sha256"],
            "header": _read_header(directory / entry["file"]),
        }
        for entry in entries
    ]
    wait_s = min(seconds, STALL_SECONDS)
    store, port = _listen(address, wait_s)
    sender = _Sender(
        [directory / entry["file"] for entry in entries], store, address, workers, backend, wait_s
    )
    del store
    try:
        yield {"port": port, "seconds": wait_s, "chunk_bytes": CHUNK_BYTES, "shards": shards}
    except Exception as error:
        sender.stop()
        if sender.error is not None:
            raise ValueError(f"{error}; sending: {sender.error}") from error
        raise
    finally:
        sender.stop()


def _listen(address: str, seconds: float) -> tuple[TCPStore, int]:
    """A store on `address` alone, and its port; by itself it would listen on every interface.

    ValueError if it cannot.
    """
    try:
        listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        port = listener.getsockname()[1]
        store = TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot listen on {address}: {error}") from None
    return store, port


class _Sender(threading.Thread):
    """Waits for the workers and sends them the files, until it is stopped."""

    def __init__(
        self,
        paths: Sequence[Path],
        store: TCPStore,
        address: str,
        workers: int,
        backend: Backend,
        seconds: float,
    ):
        super().__init__(name="weight sender", daemon=True)
        self.paths, self.store, self.address = paths, store, address
        self.workers, self.backend, self.seconds = workers, backend, seconds
        self.error: Exception | None = None
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            if self._workers_came():
                self._send()
        except Exception as error:  # whatever it is, who asked hears it
            self.error = error.with_traceback(None)  # which would keep sockets open
        finally:
            self.store = None

    def stop(self) -> None:
        """Returns when it has ended, or will end within its own deadline."""
        self.over.set()
        self.join(timeout=self.seconds)

    def _workers_came(self) -> bool:
        """Whether all did; if the block ends before, the server's answer says why."""
        keys, deadline = (
            [_here(rank) for rank in range(1, 1 + self.workers)],
            time.monotonic() + self.seconds,
        )
        while not self.store.check(keys):
            if self.over.wait(POLL_SECONDS):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the server's {self.workers} processes did not come within {self.seconds:g} s"
                )
        return True

    def _send(self) -> None:
        device = "cuda:0" if self.backend == "nccl" else "cpu"  # rank 0's
        group = _Group(self.store, 0, 1 + self.workers, self.backend, self.address, self.seconds)
        try:
            for path in self.paths:
                for values in _mapped(path).split(CHUNK_BYTES):
                    fault_point("push.sending")
                    group.broadcast(values.to(device), self.over)
            # what was sent may not have arrived: the server's answer says that
            self.over.wait(timeout=self.seconds)
        finally:
            group.close()


def _here(rank: int) -> str:
    """The key under which a worker says that it has come."""
    return f"here/{rank}"


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, on the disk until they are read."""
    with open_own(path) as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )


def _read_header(path: Path) -> dict[str, Any]:
    with open_own(path) as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


# ---- The server's side ---------------------------------------------------------------------------


def check_reach(offer: Offer) -> str:
    """This machine's address on the way to the trainer. ValueError if it does not listen."""
    try:
        with socket.create_connection(
            (offer.host, offer.port), timeout=min(offer.seconds, CONNECT_SECONDS)
        ) as way:
            return way.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"the trainer at {offer.host} port {offer.port} cannot be reached: {error}"
        ) from None


@contextmanager
def receiving(
    offer: Offer, rank: int, device: torch.device | str
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The tensors that a trainer sends, for worker `rank`, 1 to the number of workers.

    At the end, all must have been taken.

    None is handed out before the hash of its file was right: ValueError then. What arrives is on
    `device`, and the caller's.
    """
    address, store, group = check_reach(offer), None, None
    taken = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal taken
        for shard in offer.shards:
            yield from _tensors_of(shard, _receive(shard, group, offer.chunk_bytes, device))
            taken += 1

    try:
        limit = timedelta(seconds=offer.seconds)
        store = TCPStore(
            offer.host, offer.port, is_master=False, wait_for_workers=False, timeout=limit
        )
        store.set(_here(rank), b"1")
        group = _Group(store, rank, 1 + offer.workers, offer.backend, address, offer.seconds)
        yield tensors()
        if taken < len(offer.shards):
            raise RuntimeError(
                f"{taken} of {len(offer.shards)} files were read: the weights are not whole"
            )
    finally:
        if group is not None:
            group.close()
        store = None


def _receive(
    shard: dict[str, Any], group: _Group, chunk_bytes: int, device: torch.device | str
) -> Tensor:
    """The bytes of a file, whose hash is right."""
    values, digest = torch.empty(shard["size"], dtype=torch.uint8, device=device), hashlib.sha256()
    for piece in values.split(chunk_bytes):
        group.broadcast(piece)
        digest.update(memoryview(piece.cpu().numpy()))
    if digest.hexdigest() != shard["sha256"]:
        raise ValueError(
            f"not what was published: SHA-256 {digest.hexdigest()[:12]}... of {shard['size']} "
            f"bytes arrived"
        )
    return values


def _tensors_of(shard: dict[str, Any], values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views into the bytes of a file that has come, if its header is the one that was checked
    before it came.
    """
    begin = shard["size"] - data_bytes(shard["header"])
    header = bytes(values[8:begin].cpu().numpy())
    if (
        int.from_bytes(bytes(values[:8].cpu().numpy()), "little") != begin - 8
        or json.loads(header) != shard["header"]
    ):
        raise ValueError("a file's header is not the one that was announced")
    for name, dtype, shape, (start, end) in entries_of(shard["header"]):
        yield name, values[begin + start : begin + end].view(dtype).view(shape)
