"""Host memory that a GPU copies to and from at full bandwidth: pinned pages, exactly as many as are
needed.
"""

import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_registered = 0  # bytes that `pinned_buffer` holds


class _PinnedPages(mmap.mmap):
    """Anonymous pages of the host that CUDA knows of, for as long as they are mapped.

    They are taken back from CUDA by `__del__`, which comes before the pages are unmapped; a
    finaliser of `weakref` comes behind (CPython 3.11 to 3.13), and CUDA would hold what is gone.
    """

    address = None  # until they are registered

    def register(self, address: int) -> None:
        global _registered
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0)))
        self.address = address
        _registered += len(self)

    def __del__(self):
        global _registered
        if self.address is not None and not sys.is_finalizing():
            _registered -= len(self)
            # an error that is left unread is raised by whatever asks CUDA next
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.address)))


def pinned_buffer(size: int) -> Tensor:
    """Bytes [size] in pinned pages of their own, freed with the last tensor on them.

    Needs a GPU; RuntimeError if it fails.

    Torch's pinned allocator rounds up to a power of two, which for whole models is up to twice what
    they need.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = _PinnedPages(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin one by one
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    pages.register(buffer.data_ptr())
    return buffer


def pinned_like(tensor: Tensor) -> Tensor:
    """Uninitialised pinned memory for the values of `tensor`, of its shape and dtype."""
    return (
        pinned_buffer(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)
    )


def pinned_bytes() -> int:
    """Pinned host memory of this process: ours and torch's."""
    if not torch.cuda.is_available():
        return 0
    return _registered + torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)


class HostCopy:
    """Tensors that leave the GPU for host memory and come back, in place; the host's copies are
    pinned once and reused.

    DeepSpeed's own `offload_states` does this under ZeRO-3 for FusedAdam alone (0.19.8), which has
    to be compiled.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]], device: torch.device):
        self.tensors, self.device = tensors, device
        self._copies: list[Tensor] = []
        self._leaving: list[tuple[Tensor, Tensor]] = []
        self._away: list[tuple[Tensor, Tensor]] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def out(self) -> int:
        """Starts to copy; returns the bytes that will be free after `settle`.

        Nothing, if they have left before.
        """
        if self._leaving or self._away:
            return 0
        tensors = self.tensors()
        while len(self._copies) < len(tensors):
            like = tensors[len(self._copies)]
            self._copies.append(
                pinned_like(like) if self._stream else torch.empty_like(like, device="cpu")
            )
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):  # None on a CPU: no stream
            for tensor, copy in zip(tensors, self._copies, strict=True):
                copy.copy_(tensor.detach(), non_blocking=True)
        self._leaving = list(zip(tensors, self._copies, strict=True))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def settle(self) -> None:
        """Waits for the copies and lets go of the GPU memory."""
        if not self._leaving:
            return
        if self._stream is not None:
            self._stream.synchronize()
        for tensor, copy in self._leaving:
            tensor.data = copy
        self._away, self._leaving = self._leaving, []
        if self._stream is not None:
            torch.cuda.empty_cache()

    def back(self) -> None:
        """Brings everything back to where it was."""
        self.settle()
        for tensor, copy in self._away:
            tensor.data = torch.empty_like(copy, device=self.device).copy_(copy, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()
        self._away = []
