"""Versions of weights: whole or absent, ours or refused."""

import json
import os

import pytest
import safetensors.torch
import torch

from opd.weights import store
from opd.weights.store import publish, verify

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
}


@pytest.fixture
def root(tmp_path):
    publish(tmp_path / "store", WEIGHTS.items(), 3, 5)
    return tmp_path / "store"


def shards(directory) -> dict[str, torch.Tensor]:
    index = json.loads((directory / store.VERSION_INDEX).read_text())["weight_map"]
    return {
        name: safetensors.torch.load_file(directory / file)[name] for name, file in index.items()
    }


def test_what_is_read_is_what_was_written(root):
    found = shards(verify(root, 3, 5))
    assert found.keys() == WEIGHTS.keys()
    assert all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in WEIGHTS.items()
    )
    assert root.stat().st_mode & 0o777 == (root / "v3").stat().st_mode & 0o777 == 0o700


def test_large_weights_are_split_and_copied_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 40)
    buffer = torch.zeros(8)

    def gathered():  # as under ZeRO-3: the memory is used again
        for i in range(5):
            yield f"p{i}", buffer.fill_(i)

    published = publish(tmp_path / "store", gathered(), 1, 1)
    directory = verify(tmp_path / "store", 1)
    assert len(list(directory.glob("*.safetensors"))) == 5
    assert published.bytes == sum(
        file.stat().st_size for file in directory.iterdir() if file.name != "manifest.json"
    )
    assert all(
        torch.equal(value, torch.full((8,), float(name[1:])))
        for name, value in shards(directory).items()
    )


def test_the_two_newest_are_kept_by_trainer_then_version(root):
    publish(root, WEIGHTS.items(), 4, 5)
    publish(root, WEIGHTS.items(), 2, 6)  # resumed from an older checkpoint
    assert {path.name for path in root.iterdir()} == {"v4", "v2"}
    publish(root, WEIGHTS.items(), 3, 6)
    assert {path.name for path in root.iterdir()} == {"v2", "v3"}
    publish(root, WEIGHTS.items(), 1, 6)
    assert {path.name for path in root.iterdir()} == {
        "v1",
        "v3",
    }  # never the one that a server is about to read


def test_a_version_is_replaced_whole(root):
    publish(root, [("a.weight", torch.zeros(2))], 3, 6)
    assert shards(verify(root, 3, 6)).keys() == {"a.weight"}
    assert [path.name for path in root.iterdir()] == ["v3"]
    with pytest.raises(ValueError, match="fence 6"):
        verify(root, 3, 5)


def test_a_zombie_publishes_nothing(root):
    with pytest.raises(ValueError, match="fence 5"):
        publish(root, WEIGHTS.items(), 4, 4)

    def overtaken():
        publish(root, WEIGHTS.items(), 3, 7)
        yield from WEIGHTS.items()

    with pytest.raises((ValueError, OSError)):
        publish(root, overtaken(), 4, 5)
    assert [path.name for path in root.iterdir()] == ["v3"]
    verify(root, 3, 7)


def test_a_failed_publication_leaves_what_there_was(root):
    def breaks():
        yield "a.weight", torch.zeros(2)
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError):
        publish(root, breaks(), 3, 6)
    assert [path.name for path in root.iterdir()] == ["v3"]
    assert shards(verify(root, 3, 5)).keys() == WEIGHTS.keys()


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def tear(path):
    path.write_bytes(path.read_bytes()[:-5])


def link(path):
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def renumber(path):
    path.write_text(path.read_text().replace('"version": 3', '"version": 4'))


def escape(path):
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


SHARD, MANIFEST = "model-00001.safetensors", store.VERSION_MANIFEST


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SHARD, flip),
        (SHARD, tear),
        (SHARD, link),
        (SHARD, os.remove),
        (store.VERSION_INDEX, flip),
        (store.VERSION_INDEX, os.remove),
        (MANIFEST, tear),
        (MANIFEST, os.remove),
        (MANIFEST, link),
        (MANIFEST, renumber),
        (MANIFEST, escape),
        ("extra.safetensors", lambda p: p.write_bytes(b"")),
        (".", lambda p: p.chmod(0o755)),
        ("..", lambda p: p.chmod(0o770)),
        ("../v3", link),
    ],
)
def test_damage_is_refused(root, name, damage):
    damage(root / "v3" / name if name != "../v3" else root / "v3")
    with pytest.raises(ValueError):
        verify(root, 3, 5)


def test_a_root_that_is_a_link_or_open_to_others_takes_nothing(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="link"):
        publish(tmp_path / "link", WEIGHTS.items(), 1, 1)
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="0700"):
        publish(tmp_path / "open", WEIGHTS.items(), 1, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_other_peoples_files_are_refused(root):
    os.chown(root / "v3" / SHARD, 12345, -1)
    with pytest.raises(ValueError, match="this user"):
        verify(root, 3)
    os.chown(root, 12345, -1)
    with pytest.raises(ValueError, match="this user"):
        publish(root, WEIGHTS.items(), 4, 5)


def test_the_default_root_is_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert store.default_root("run") == store.default_root(tmp_path / "run")
    assert store.default_root("run") != store.default_root("other")
