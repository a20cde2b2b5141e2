"""Host memory that a GPU copies to and from at full bandwidth: pinned pages, exactly as many as are
needed.
"""

import mmap
import weakref

import torch
from torch import Tensor

_registered = 0  # bytes that `pinned_buffer` holds


def pinned_buffer(size: int) -> Tensor:
    """Bytes [size] in pinned pages of their own, freed with the last tensor on them.

    Needs a GPU; RuntimeError if it fails.

    Torch's pinned allocator rounds up to a power of two, which for whole models is up to twice what
    they need.
    """
    global _registered
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)))
    weakref.finalize(pages, _unregister, buffer.data_ptr(), size).atexit = False
    _registered += size
    return buffer


def _unregister(address: int, size: int) -> None:
    global _registered
    torch.cuda.cudart().cudaHostUnregister(address)
    _registered -= size


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
