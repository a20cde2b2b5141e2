"""A safetensors file that is written tensor by tensor is what the library reads."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opd.weights import shard_file, store
from opd.weights.shard_file import DTYPES, ShardFile
from opd.weights.store import publish, verify


def written(path, tensors: dict[str, torch.Tensor]) -> None:
    shard = ShardFile(path)
    for name, tensor in tensors.items():
        assert shard.takes(name, tensor)
        shard.write(name, tensor)
    shard.close()


def test_the_library_reads_every_type_and_shape(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(2.5, dtype=torch.float64), 'ä "quoted"': torch.ones(3, 6).t()}
    for dtype in DTYPES:  # the wide ones first
        tensors[str(dtype)] = torch.randint(0, 2, (4, 2), generator=generator).to(dtype)
    tensors["empty"] = torch.zeros(0, 7)
    written(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_that_would_lie_askew_or_find_no_room_gets_another_file(tmp_path, monkeypatch):
    weights = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2)}
    publish(tmp_path / "a", weights.items(), 1, 1)
    index = json.loads((verify(tmp_path / "a", 1) / store.VERSION_INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 2
    monkeypatch.setattr(shard_file, "HEADER_ROOM", 4096)
    many = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(200)}
    publish(tmp_path / "b", many.items(), 1, 1)
    directory = verify(tmp_path / "b", 1)
    shards = sorted(directory.glob("*.safetensors"))
    found = {name: value for path in shards for name, value in load_file(path).items()}
    assert 2 < len(shards) < 10 and found.keys() == many.keys()
    assert all(torch.equal(found[name], value) for name, value in many.items())


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    written(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    with pytest.raises(FileExistsError):
        ShardFile(tmp_path / "x.safetensors")
