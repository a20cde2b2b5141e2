"""Weights on their way from a trainer to its servers: versions in a directory, each whole or
absent.

    ROOT/v12/model-00001.safetensors ...    as in a Hugging Face checkpoint
            model.safetensors.index.json
            manifest.json                   version, fence, sizes and hashes; written last

A version appears by one rename. `verify` reads every byte again: what a server loads is what the
trainer wrote. ROOT belongs to one user alone (mode 0700); links and other people's files are
refused. So a hash has to find a torn or a mixed file, not a forged one, and XXH3 with 128 bits does
at the speed of memory. ROOT may lie in shared memory, or in a folder that machines share.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash
from torch import Tensor

from opd.weights.shard_file import ShardFile

VERSION_MANIFEST, VERSION_INDEX = "manifest.json", "model.safetensors.index.json"
SHARD_BYTES = 256 << 20  # small enough that hashing keeps up with writing
KEPT = 2  # a server may still read the version before
SHARED_MEMORY = Path("/dev/shm")
READ_BYTES = 1 << 20
READERS = 4  # files that are read and hashed at a time


@dataclass(frozen=True, slots=True)
class Published:
    """What it took to publish a version."""

    bytes: int
    seconds: float


def default_root(run_dir: str | Path) -> Path:
    """A directory in shared memory that is the run's own, also after a restart: what a killed
    trainer left is used again.
    """
    name = hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return parent / f"opd_weights_{os.geteuid()}_{name}"


def claim(root: Path) -> None:
    """Makes ROOT if it is missing. ValueError if it is not ours alone."""
    try:
        root.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass  # whatever it is
    except OSError as error:
        raise ValueError(f"{root}: {error.strerror}") from None
    _check_directory(root)


def publish(
    root: Path, named_parameters: Iterable[tuple[str, Tensor]], version: int, fence: int
) -> Published:
    """Writes a version and removes all but the two newest.

    An older run's version of the same number gives way.

    A tensor is copied before the next one is asked for. On ranks other than 0 a caller only
    exhausts its generator. Raises ValueError if ROOT is not ours alone, or a trainer with a larger
    fence has published here.
    """
    start = time.monotonic()
    root = Path(root)
    claim(root)
    _check_fence(root, fence)
    for leftover in root.glob(".tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging, target = root / f".tmp.{version}.{secrets.token_hex(4)}", root / f"v{version}"
    staging.mkdir(mode=0o700)
    try:
        files = _write_shards(staging, named_parameters)
        manifest = json.dumps(
            {"version": version, "fence": fence, "files": files}, indent=1
        ).encode()
        _write(staging, VERSION_MANIFEST, manifest)
        _check_fence(root, fence)  # gathering takes long enough for a successor to come
        if target.exists():
            target.rename(root / f".tmp.old.{version}.{secrets.token_hex(4)}")
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _prune(root, target)
    size = sum(file["size"] for file in files)
    return Published(size, time.monotonic() - start)


def verify(root: Path, version: int, fence: int | None = None) -> Path:
    """The directory of a version, if every file is there, ours, and has its hash; and no other.

    Else ValueError.

    With a `fence` it must be the one of the trainer that published the version.
    """
    directory = Path(root, f"v{version}")
    _check_directory(Path(root))
    _check_directory(directory)
    manifest = _read_version_manifest(directory)
    if manifest["version"] != version or (fence is not None and manifest["fence"] != fence):
        raise ValueError(
            f"{directory}: version {manifest['version']} of fence {manifest['fence']}, not version "
            f"{version} of {fence}"
        )
    expected = {entry["file"]: entry for entry in manifest["files"]}
    found = {path.name for path in directory.iterdir()} - {VERSION_MANIFEST}
    if found != set(expected) or len(expected) != len(manifest["files"]):
        raise ValueError(
            f"{directory}: its files are not those of its manifest: "
            f"{sorted(found ^ set(expected))[:4]}"
        )
    with ThreadPoolExecutor(READERS) as readers:
        entries = readers.map(_entry, (directory / name for name in expected))
        for entry in entries:
            if entry != expected[entry["file"]]:
                raise ValueError(
                    f"{directory / entry['file']}: not what was published: {entry['size']} bytes "
                    f"with hash {entry['xxh3'][:12]}..."
                )
    return directory


def check_names(published: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
    """ValueError unless every parameter is there under one of its names, and nothing else.

    Tied ones are one object.
    """
    published = set(published)
    if unknown := published - set(parameters):
        raise ValueError(
            f"{len(unknown)} published tensors are none of the model's, {min(unknown)} first"
        )
    there = {id(parameters[name]) for name in published}
    if missing := [name for name, parameter in parameters.items() if id(parameter) not in there]:
        raise ValueError(
            f"{len(missing)} parameters of the model were not published, {missing[0]} first"
        )


def _write_shards(directory: Path, named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict]:
    """Manifest entries of the shards and their index. A shard is hashed while the next one is
    written.
    """
    weight_map: dict[str, str] = {}
    entries: list[Future[dict]] = []
    with ThreadPoolExecutor(READERS) as readers, ExitStack() as opened:
        shard = None

        def finish() -> None:
            if shard is not None:
                shard.close()
                entries.append(readers.submit(_entry, shard.path))

        for name, tensor in named_parameters:
            assert name not in weight_map, f"{name}: two tensors of one name"
            full = shard is not None and shard.num_bytes + tensor.nbytes > SHARD_BYTES
            if shard is None or full or not shard.takes(name, tensor):
                finish()
                shard = ShardFile(directory / f"model-{len(entries) + 1:05d}.safetensors")
                opened.callback(shard.give_up)
            shard.write(name, tensor)
            weight_map[name] = shard.path.name
        finish()
    if not weight_map:
        raise ValueError("no weights to publish")
    files = [entry.result(timeout=0) for entry in entries]  # all are done
    total = sum(file["size"] for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [*files, _write(directory, VERSION_INDEX, json.dumps(index).encode())]


def _write(directory: Path, name: str, content: bytes) -> dict:
    """Writes a file that must not exist yet; its manifest entry."""
    with open(directory / name, "xb") as file:
        file.write(content)
    return _entry(directory / name)


def _check_directory(path: Path) -> None:
    """ValueError unless it is a directory, no link, of this user, that nobody else can write to or
    read.
    """
    try:
        facts = path.lstat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISDIR(facts.st_mode):
        raise ValueError(f"{path}: not a directory, or a link to one")
    if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise ValueError(
            f"{path}: must belong to this user with mode 0700 (chmod 700); others could put "
            "weights there"
        )


def _open_own(path: Path):
    """A regular file of this user, for reading; ValueError for a link or another's."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        file.close()
        raise ValueError(f"{path}: not a regular file of this user")
    return file


def _entry(path: Path) -> dict:
    """What a manifest says of a file."""
    digest, size = xxhash.xxh3_128(), 0
    block = bytearray(READ_BYTES)
    with _open_own(path) as file:
        while read := file.readinto(block):
            digest.update(memoryview(block)[:read])
            size += read
    return {"file": path.name, "size": size, "xxh3": digest.hexdigest()}


def _read_version_manifest(directory: Path) -> dict:
    """A manifest with the right fields, or ValueError."""
    with _open_own(directory / VERSION_MANIFEST) as file:
        try:
            manifest = json.loads(file.read())
            int(manifest["version"]), int(manifest["fence"])
            names = [
                str(entry["file"])
                for entry in manifest["files"]
                if int(entry["size"]) >= 0 and entry["xxh3"]
            ]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{directory / VERSION_MANIFEST}: torn: {type(error).__name__}: {error}"
            ) from None
    if not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise ValueError(f"{directory / VERSION_MANIFEST}: a file outside its directory")
    return manifest


def _versions(root: Path) -> list[tuple[int, int, Path]]:
    """(fence, version, directory) of what was published, oldest first; what has no good manifest
    counts as the oldest.
    """
    found = []
    for directory in root.glob("v*"):
        try:
            manifest = _read_version_manifest(directory)
            found.append((manifest["fence"], manifest["version"], directory))
        except ValueError:
            found.append((-1, -1, directory))
    return sorted(found)


def _check_fence(root: Path, fence: int) -> None:
    newest = max((found for found, _, _ in _versions(root)), default=fence)
    if newest > fence:
        raise ValueError(
            f"{root}: a trainer with fence {newest} has published here; this one has {fence}"
        )


def _prune(root: Path, newest: Path) -> None:
    older = [directory for _, _, directory in _versions(root) if directory != newest]
    for directory in older[: len(older) - (KEPT - 1)]:
        doomed = root / f".tmp.old.{secrets.token_hex(4)}"
        directory.rename(doomed)  # first: whoever looks for it finds all of it or nothing
        shutil.rmtree(doomed, ignore_errors=True)
    for leftover in root.glob(".tmp.old.*"):
        shutil.rmtree(leftover, ignore_errors=True)
