"""Pinned host memory: pages are taken back from CUDA while they are still mapped. CUDA is a double
here.
"""

from pathlib import Path

import pytest
import torch

from opd.engines import host_memory


class Cuda:
    """What `cudart` says to registrations: it writes down the calls, and whether the address was
    mapped then.
    """

    def __init__(self):
        self.calls, self.says = [], 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return self._called("register", address)

    def cudaHostUnregister(self, address: int) -> int:
        return self._called("unregister", address)

    def _called(self, name: str, address: int) -> int:
        maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()]
        ranges = [[int(end, 16) for end in span.split("-")] for span in maps]
        self.calls.append((name, address, any(a <= address < b for a, b in ranges)))
        return self.says


@pytest.fixture
def cuda(monkeypatch):
    double = Cuda()

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")

    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: double)
    return double


def test_pages_are_unregistered_while_they_are_mapped(cuda):
    size, before = (5 << 20) + 3, host_memory._registered
    buffer = host_memory.pinned_buffer(size)
    buffer.fill_(7)
    part, address = buffer[1:9], buffer.data_ptr()
    assert buffer.shape == (size,) and host_memory._registered == before + size
    del buffer
    assert cuda.calls == [("register", address, True)], "a tensor is left on it"
    assert part.tolist() == [7] * 8
    del part
    assert cuda.calls[1:] == [("unregister", address, True)]
    assert host_memory._registered == before


def test_nothing_takes_no_pages(cuda):
    assert host_memory.pinned_buffer(0).numel() == 0 and not cuda.calls


def test_pages_that_cuda_refuses_are_not_counted(cuda):
    before, cuda.says = host_memory._registered, 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        host_memory.pinned_buffer(4096)
    assert host_memory._registered == before and len(cuda.calls) == 1
