"""Content hashes: what a model or a data set is, whatever its path."""

import hashlib
from pathlib import Path

import huggingface_hub

_SAMPLED_ABOVE = 64 << 20
_SAMPLE_BLOCK = 1 << 20
_SAMPLES = 64
_CONTENT_SUFFIXES = (
    *(".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"),
    *(".safetensors", ".bin", ".pt", ".pth"),
    *(".jsonl", ".parquet", ".arrow", ".csv"),
)


def content_hash(path_or_id: str) -> str:
    """What a model or data set is, for the fingerprint of a run. No network.

    A file: its SHA-256. A directory: SHA-256 over the sorted names, sizes and contents of its
    configuration, tokenizer, weight and data files (top level only for a model directory, one with
    a config.json, and for an adapter's). Of files above 64 MiB, 64 evenly spaced blocks of 1 MiB
    stand for the content, first and last included, so that 60 GB hash in seconds: the weights of
    another training run are seen, an edit of a few bytes between the blocks is not. A hub id that
    is no local path: the id and, if the local cache has it, `@commit`; so call it after loading,
    when the cache has it. Raises ValueError for a directory without such files, and for what is
    neither a path nor a hub id.
    """
    path = Path(path_or_id)
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        return _directory_hash(path)
    try:
        cached = huggingface_hub.try_to_load_from_cache(path_or_id, "config.json")
    except huggingface_hub.errors.HFValidationError:
        raise ValueError(
            f"{path_or_id}: no such file or directory, and not a hub id either"
        ) from None
    return f"{path_or_id}@{Path(cached).parent.name}" if isinstance(cached, str) else path_or_id


def _directory_hash(directory: Path) -> str:
    is_model = any((directory / name).exists() for name in ("config.json", "adapter_config.json"))
    found = directory.iterdir() if is_model else directory.rglob("*")
    names = {
        str(p.relative_to(directory)): p
        for p in found
        if p.is_file() and p.suffix in _CONTENT_SUFFIXES
    }
    names = {
        name: p
        for name, p in names.items()
        if not any(part.startswith(".") for part in Path(name).parts)
    }
    if not names:
        raise ValueError(f"{directory}: holds no model and no data files")
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{names[name].stat().st_size}\0".encode())
        _update_with_content(digest, names[name])
    return digest.hexdigest()


def _update_with_content(digest, path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _SAMPLED_ABOVE:
            while block := file.read(_SAMPLE_BLOCK):
                digest.update(block)
            return
        for i in range(_SAMPLES):
            file.seek(i * (size - _SAMPLE_BLOCK) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BLOCK))


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
