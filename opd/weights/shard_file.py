"""A safetensors file that is written tensor by tensor: each goes straight to its place, and memory
holds none of them.

The library's own writer wants all tensors of a file at once, so a shard would be copied before it
is copied. In the format a header of JSON comes first and may end in blanks: its room is left open,
and filled when all tensors are there (https://github.com/huggingface/safetensors, "Format").
"""

import json
from pathlib import Path

import torch
from torch import Tensor

HEADER_ROOM = 1 << 20  # room for about 7,000 tensors
LENGTH_BYTES = 8
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardFile:
    """Writes `path`, which must not exist yet. `close` makes it whole."""

    def __init__(self, path: Path):
        self.path, self.num_bytes = path, 0
        self._entries = ['"__metadata__": {"format": "pt"}']
        self._header_bytes = LENGTH_BYTES + len("{}") + len(self._entries[0])
        self._file = path.open("xb")
        self._file.seek(HEADER_ROOM)

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether its header has room, and the tensor would lie where its type may lie."""
        needed = self._header_bytes + len(", ") + len(self._entry(name, tensor))
        return needed <= HEADER_ROOM and self.num_bytes % tensor.element_size() == 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Any device; the bytes are in the file when it returns."""
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        entry = self._entry(name, tensor)
        self._file.write(memoryview(values.numpy()))
        self._entries.append(entry)
        self._header_bytes += len(", ") + len(entry)
        self.num_bytes += len(values)

    def _entry(self, name: str, tensor: Tensor) -> str:
        span = [self.num_bytes, self.num_bytes + tensor.nbytes]
        about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        return f"{json.dumps(name)}: {json.dumps(about)}"

    def close(self) -> None:
        text = f"{{{', '.join(self._entries)}}}".encode().ljust(HEADER_ROOM - LENGTH_BYTES)
        assert len(text) == HEADER_ROOM - LENGTH_BYTES, "the header runs into the tensors"
        self._file.seek(0)
        self._file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        self._file.close()

    def give_up(self) -> None:
        """Closes a file that nobody will read."""
        self._file.close()
