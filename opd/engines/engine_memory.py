"""The GPU memory of one engine among several in a process: who owns an allocation, and how it
sleeps and comes back.

vLLM's sleep allocator is one per process. It hands out address ranges that stay reserved while the
memory behind them is unmapped, so tensors and CUDA graphs survive a sleep; but it puts every
allocation it knows to sleep, those of other engines included (vllm 0.32: `CuMemAllocator`). Here an
allocation belongs to the engine that was active when it was made, and an engine suspends and
resumes its own.

An allocation is awake (mapped), or asleep (unmapped), or arriving: mapped, with the copy of its
content under way.

    asleep --prefetch--> arriving --resume--> awake --suspend--> asleep

Sizes are bytes. A handle is vLLM's: (device, size, address, a handle of the driver's own).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from opd.engines.host_memory import pinned_buffer

WEIGHTS, KV_CACHE = "weights", "kv_cache"
WORKSPACE = "workspace"  # scratch: nothing in it outlives a call
DEFERRABLE = (WEIGHTS, KV_CACHE)  # any wake brings back all other tags, as in vLLM
Handle = tuple[int, int, int, object]


class Allocation(Protocol):
    """What vLLM keeps of an allocation (vllm 0.32: `AllocationData`)."""

    handle: Handle
    tag: str
    cpu_backup_tensor: Tensor | None
    is_asleep: bool


class Driver(Protocol):
    """Moves memory.

    Copies are started in order and done after `synchronize`; any call may raise RuntimeError.
    """

    def map(self, handle: Handle) -> None: ...

    def unmap(self, handle: Handle) -> None: ...

    def host_buffer(self, size: int) -> Tensor: ...

    def copy_to_host(self, handle: Handle, buffer: Tensor) -> None: ...

    def copy_from_host(self, handle: Handle, buffer: Tensor) -> None: ...

    def synchronize(self) -> None: ...


class EngineMemory:
    """The allocations made inside `active()`.

    `frozen` weights never change: they are copied to the host once.

    `allocator` has vLLM's interface: a dict `pointer_to_data` and `get_current_usage`; both are
    taken over. Its free callback may arrive at any time, also while this or another engine sleeps.
    """

    current: ClassVar["EngineMemory | None"] = None

    def __init__(self, name: str, allocator, driver: Driver, *, frozen: bool = False):
        self.name, self.driver, self.frozen = name, driver, frozen
        self._allocations: dict[int, Allocation] = {}
        # the host has a copy; that of an awake allocation may be out of date
        self._saved: set[int] = set()
        self._arriving: set[int] = set()
        _take_over(allocator)

    @contextlib.contextmanager
    def active(self) -> Iterator["EngineMemory"]:
        """Allocations made inside belong to this engine."""
        before, EngineMemory.current = EngineMemory.current, self
        try:
            yield self
        finally:
            EngineMemory.current = before

    def size(self, *tags: str) -> int:
        """Bytes that the engine holds when awake; of these tags only, if any are given."""
        return sum(data.handle[1] for data in self._all().values() if not tags or data.tag in tags)

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        buffers = [data.cpu_backup_tensor for data in self._all().values()]
        return sum(buffer.numel() for buffer in buffers if buffer is not None)

    def _all(self) -> dict[int, Allocation]:
        """A copy, since garbage collection may free an allocation in the middle of any loop."""
        return self._allocations.copy()

    # ---- Asleep ----------------------------------------------------------------------------------

    def suspend(self, level: int) -> None:
        """Unmaps all.

        The KV cache and scratch are dropped; weights are kept on the host at level 1, dropped at
        level 2.

        What has another tag is kept. After an error some allocations may be asleep and the others
        are awake, each whole; another call goes on from there.
        """
        assert level in (1, 2), f"{self.name}: sleep level {level}"
        self._put_back(set(self._arriving))
        dropped = (KV_CACHE, WORKSPACE) if level == 1 else (KV_CACHE, WORKSPACE, WEIGHTS)
        awake = {address: data for address, data in self._all().items() if not data.is_asleep}
        self._save({address: data for address, data in awake.items() if data.tag not in dropped})
        for address, data in self._all().items():
            if data.tag in dropped:
                data.cpu_backup_tensor = None
                self._saved.discard(address)
        for address, data in awake.items():
            if self._allocations.get(address) is data:  # else freed meanwhile
                self.driver.unmap(data.handle)
                data.is_asleep = True

    def drop_cache(self) -> None:
        """Unmaps the KV cache alone, when nothing on the device reads it any more;
        `resume(["kv_cache"])` maps it again.
        """
        self.driver.synchronize()
        for address, data in self._all().items():
            if (
                data.tag == KV_CACHE
                and not data.is_asleep
                and self._allocations.get(address) is data
            ):
                self.driver.unmap(data.handle)
                data.is_asleep = True

    def _save(self, allocations: dict[int, Allocation]) -> None:
        """Copies what may have changed.

        Buffers are kept for the next sleep: pinning them costs more than copying.
        """
        stale = {
            address: data
            for address, data in allocations.items()
            if not (self.frozen and data.tag == WEIGHTS and address in self._saved)
        }
        for address, data in stale.items():
            if data.cpu_backup_tensor is None:
                data.cpu_backup_tensor = self.driver.host_buffer(data.handle[1])
            if self._allocations.get(address) is data:  # else freed meanwhile
                self.driver.copy_to_host(data.handle, data.cpu_backup_tensor)
        if stale:
            self.driver.synchronize()
        self._saved |= stale.keys() & self._allocations.keys()

    # ---- Awake -----------------------------------------------------------------------------------

    def prefetch(self) -> None:
        """Maps the weights and starts their copies without waiting; `resume` then only waits for
        them.

        Nothing happens where the host holds none. After an error all that this concerns is asleep.
        """
        self._start([address for address in self._asleep([WEIGHTS]) if address in self._saved])

    def resume(self, tags: list[str] | None = None) -> None:
        """Wakes these of ("weights", "kv_cache"), or both, and all that has another tag.

        What the host holds is copied back; everything else has undefined content. All or nothing:
        after an error everything that this call was to wake is asleep, and another call works.
        """
        waking = self._asleep(tags)
        self._start(waking)
        try:
            if self._arriving:
                self.driver.synchronize()
        except BaseException:
            self._put_back(self._arriving.intersection(waking))
            raise
        for address in waking:
            if address in self._arriving:  # else freed meanwhile
                self._arriving.remove(address)
                self._allocations[address].is_asleep = False

    def _asleep(self, tags: list[str] | None) -> list[int]:
        """Addresses of what a wake of `tags` concerns."""
        deferred = set(DEFERRABLE) - set(DEFERRABLE if tags is None else tags)
        return [
            address
            for address, data in self._all().items()
            if data.is_asleep and data.tag not in deferred
        ]

    def _start(self, addresses: list[int]) -> None:
        try:
            for address in addresses:
                data = self._allocations.get(address)
                if data is None or address in self._arriving:  # freed meanwhile, or prefetched
                    continue
                self.driver.map(data.handle)
                self._arriving.add(address)
                if address in self._saved:
                    self.driver.copy_from_host(data.handle, data.cpu_backup_tensor)
        except BaseException:
            self._put_back(self._arriving.intersection(addresses))
            raise

    def _put_back(self, arriving: set[int]) -> None:
        """Back to sleep before the wake is complete: nobody has written to it, so what the host
        holds is still right.
        """
        if arriving:
            self.driver.synchronize()
        for address in arriving:
            if address in self._arriving:  # else freed meanwhile
                self.driver.unmap(self._allocations[address].handle)
                self._arriving.remove(address)

    # ---- Freed -----------------------------------------------------------------------------------

    def _forget(self, address: int) -> None:
        """Before vLLM frees an allocation. Its free unmaps, so what sleeps is mapped once more.

        In vllm 0.32 unmapping twice leaves an error behind that the next map of any engine reports
        as its own. If there is no room to map, that is what happens.
        """
        data = self._allocations.pop(address)
        self._saved.discard(address)
        if data.cpu_backup_tensor is not None:
            self.driver.synchronize()  # a copy may be under way, and the buffer goes now
        if data.is_asleep and address not in self._arriving:
            with contextlib.suppress(RuntimeError):
                self.driver.map(data.handle)
        self._arriving.discard(address)
        data.is_asleep, data.cpu_backup_tensor = False, None


class _Table(dict):
    """vLLM's address -> allocation, for all engines; tells the owners what comes and goes."""

    def __init__(self, known: dict[int, Allocation]):
        super().__init__(known)
        self.owners: dict[int, EngineMemory] = {}

    def __setitem__(self, address: int, data: Allocation) -> None:
        self._disown(address)
        super().__setitem__(address, data)
        if EngineMemory.current is not None:
            self.owners[address] = EngineMemory.current
            EngineMemory.current._allocations[address] = data

    def __delitem__(self, address: int) -> None:
        self._disown(address)
        super().__delitem__(address)

    def pop(self, address: int, *default):
        self._disown(address)
        return super().pop(address, *default)

    def _disown(self, address: int) -> None:
        owner = self.owners.pop(address, None)
        if owner is not None:
            owner._forget(address)


def _take_over(allocator) -> None:
    """Once per allocator. vllm 0.32 refuses to load weights while the process has any allocation:
    "one instance per process"; so while an engine is active, the usage is that of this engine.
    """
    if isinstance(allocator.pointer_to_data, _Table):
        return
    allocator.pointer_to_data = _Table(allocator.pointer_to_data)
    usage_of_all = allocator.get_current_usage
    allocator.get_current_usage = lambda: (
        EngineMemory.current.size() if EngineMemory.current else usage_of_all()
    )


class CudaDriver:
    """Copies on a stream of its own, at full bandwidth: host buffers are pinned.

    `map` and `unmap` are vLLM's `create_and_map` and `unmap_and_release`, which raise RuntimeError
    with CUDA's reason.
    """

    def __init__(self, map: Callable[[Handle], None], unmap: Callable[[Handle], None]):
        self.map, self.unmap = map, unmap
        self._stream = torch.cuda.Stream()

    def host_buffer(self, size: int) -> Tensor:
        """Bytes [size], pinned."""
        return pinned_buffer(size)

    def copy_to_host(self, handle: Handle, buffer: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())  # what computes may still write
        with torch.cuda.stream(self._stream):
            buffer.copy_(_bytes_at(handle), non_blocking=True)

    def copy_from_host(self, handle: Handle, buffer: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            _bytes_at(handle).copy_(buffer, non_blocking=True)

    def synchronize(self) -> None:
        self._stream.synchronize()


class _DeviceBytes:
    """A range of device memory for torch to read, by the protocol that array libraries share."""

    def __init__(self, handle: Handle):
        _, size, address, _ = handle
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _bytes_at(handle: Handle) -> Tensor:
    return torch.as_tensor(_DeviceBytes(handle), device=f"cuda:{handle[0]}")
