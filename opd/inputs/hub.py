"""Models of the Hugging Face hub: `ORG/NAME`, or `ORG/NAME@REVISION` for a branch, tag or commit.

A hub id becomes a directory of the local cache at the very start, and everything behind works on
directories. Configuration and tokenizer come first. Weights come last, when all else is known to be
good, once per machine. Until then, and in a dry run for good, the headers of the weight files stand
for them: a few KB each.
"""

import atexit
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import DryRunFileInfo, HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from opd.config import GIB, SELF, TeacherSpec
from opd.hub_names import as_named
from opd.inputs.shapes import check_path
from opd.log import one_line
from opd.ops.headers import ADAPTER_WEIGHTS, INDEX, WHOLE, weight_files

# All of a model but its weights.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.bpe", "*.vocab")
COMMIT = re.compile("[0-9a-f]{40}")

_headers: dict[str, Path] = {}  # snapshot -> a directory that holds headers in place of weights
_notes: dict[str, str] = {}  # snapshot -> what a dry run has not checked


def models_here(cfg) -> dict[str, str]:
    """Model -> its flag, of the student and all teachers that do not run elsewhere."""
    models = [("--student_model", cfg.model.student_model)]
    models += [(f"--teacher {t.name}", t.model) for t in cfg.teachers if not t.is_served]
    return {model: flag for flag, model in reversed(models) if not model.startswith(SELF)}


def find_models(cfg) -> dict[str, str]:
    """Hub id, as the configuration has it -> the directory of its snapshot, without weights.

    ValueError with one line for what the hub refuses, or cannot be asked.
    """
    flags = models_here(cfg).items()
    found = {m: find_snapshot(flag, m) for m, flag in reversed(flags) if not Path(m).is_dir()}
    for spec in cfg.teachers:
        if spec.adapter and not Path(spec.adapter).is_dir():
            flag = f"--teacher {spec.name}: adapter"
            found[spec.adapter] = find_snapshot(flag, spec.adapter, (*SMALL_FILES, ADAPTER_WEIGHTS))
    return found


def with_models(cfg, places: Mapping[str, str]):
    """The configuration with other models: `places` maps the old to the new. A teacher that is the
    student as it was gets the student's.
    """
    student = places.get(cfg.model.student_model, cfg.model.student_model)

    def placed(spec: TeacherSpec) -> TeacherSpec:
        if spec.is_served:
            return spec
        if spec.model.startswith(SELF):
            spec = replace(spec, past=spec.model.removeprefix(SELF))
        model = student if spec.past else places.get(spec.model, spec.model)
        return replace(spec, model=model, adapter=places.get(spec.adapter, spec.adapter))

    teachers = tuple(map(placed, cfg.teachers))
    return replace(cfg, model=replace(cfg.model, student_model=student), teachers=teachers)


def find_snapshot(flag: str, model: str, files: Sequence[str] = SMALL_FILES) -> str:
    """The directory of a model: itself, or for a hub id the snapshot of its commit in the local
    cache, where these files are then: everything but the weights. ValueError if it cannot be had.
    """
    if Path(model).is_dir():
        return model
    repo, at, revision = model.partition("@")
    check_path(flag, model)
    if at and (not revision or "@" in revision):
        raise ValueError(
            f"{flag} {model}: no such directory, and no hub id; write ORG/NAME@REVISION, a branch, "
            "a tag or a commit"
        )
    with _one_line_of_the_hub(flag, model):
        validate_repo_id(repo)
        with _one_at_a_time():
            return snapshot_download(repo, revision=revision or None, allow_patterns=list(files))


def fetch(flag: str, model: str) -> str:
    """The directory of a model, with its weights: what a server needs."""
    path = find_snapshot(flag, model)
    fetch_weights({path: flag})
    return path


def fetch_weights(models: Mapping[str, str]) -> list[str]:
    """Downloads the weights that the cache lacks; returns the directories that got some.

    `models` are directory -> flag. One process of a machine downloads, others wait for it.
    ValueError if they do not fit on the disk, or the hub fails.
    """
    if all(map(_is_whole, models)):
        return []
    with _one_at_a_time():
        missing = {path: flag for path, flag in models.items() if not _is_whole(path)}
        files = {path: _weights_of(path, flag) for path, flag in missing.items()}
        _check_disk(files, missing)
        for path, flag in missing.items():
            repo, commit = _repo_of(path)
            size = _size(files[path]) / GIB
            # whoever is first downloads, and stdout may be for something else
            print(f"downloading {as_named(path)}: {size:.1f} GiB", file=sys.stderr, flush=True)
            names = [file.filename for file in files[path]]
            with _one_line_of_the_hub(flag, as_named(path)):
                snapshot_download(repo, revision=commit, allow_patterns=names)
    return [path for path in models if _repo_of(path)]


def _check_disk(files: Mapping[str, list[DryRunFileInfo]], flags: Mapping[str, str]) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    need, free = sum(map(_size, files.values())), shutil.disk_usage(cache).free
    if need > free:
        path = max(files, key=lambda path: _size(files[path]))
        raise ValueError(
            f"{flags[path]} {as_named(path)}: the download needs {need / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} GiB are free in {cache}; set HF_HOME to a folder on a larger disk"
        )


def _size(files: list[DryRunFileInfo]) -> int:
    return sum(file.file_size or 0 for file in files if file.will_download)


def files_of(flag: str, path: str) -> Path | None:
    """A directory whose weight files may be checked as those of `path`: itself, or headers of what
    is not downloaded yet, on sparse files of the true size.

    None where the hub gives no headers, and on all ranks of a machine but the first: they would
    ask it for the same.
    """
    if _is_whole(path):
        return Path(path)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    if path not in _headers and path not in _notes:
        try:
            _headers[path], size = _write_headers(flag, path)
        except (OSError, errors.HfHubHTTPError) as error:
            _notes[path] = f"its weight files are not checked: no headers ({one_line(error)})"
        else:
            _notes[path] = (
                f"{size / GIB:.1f} GiB to download; names, shapes and types of its weights are "
                "checked by headers, their values are not"
            )
    return _headers.get(path)


def not_checked() -> list[str]:
    """What a dry run leaves unchecked, a line for each model whose weights are not here."""
    return [f"{as_named(path)}: {note}" for path, note in _notes.items()]


def _write_headers(flag: str, path: str) -> tuple[Path, int]:
    """(directory, bytes to download)."""
    repo, commit = _repo_of(path)
    root = Path(tempfile.mkdtemp(prefix="opd_headers_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for file in Path(path).iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (root / file.name).symlink_to(file.resolve())
    files = _weights_of(path, flag)

    def read(name: str):
        return HfApi().parse_safetensors_file_metadata(repo, name, revision=commit)

    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, [file.filename for file in files]))
    except errors.SafetensorsParsingError as error:
        raise ValueError(f"{flag} {as_named(path)}: {one_line(error)}") from None
    for file, header in zip(files, found, strict=True):
        _write_header(root / file.filename, header)
    return root, _size(files)


def _write_header(path: Path, header) -> None:
    """A file that safetensors opens: the header, and a hole in place of the numbers."""
    tensors = header.tensors.items()
    content = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for name, t in tensors
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + max((t.data_offsets[1] for _, t in tensors), default=0))


def _weights_of(path: str, flag: str) -> list[DryRunFileInfo]:
    """The weight files of a snapshot that transformers and vLLM read, and what else they would
    stumble over; a second copy in another form (consolidated.safetensors) stays at the hub.
    """
    repo, commit = _repo_of(path)
    with _one_line_of_the_hub(flag, as_named(path)):
        files = snapshot_download(
            repo, revision=commit, allow_patterns=["*.safetensors"], dry_run=True
        )
    files = [file for file in files if "/" not in file.filename]
    index = Path(path) / INDEX
    if not index.is_file():
        return files
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # whoever checks the files says what is wrong with the index
    return [file for file in files if file.filename in {*named, WHOLE}]


def _repo_of(path: str) -> tuple[str, str] | None:
    """(repository, commit) of a snapshot in the cache; None for any other directory."""
    folder, snapshots, commit = ("", "", *Path(path).parts)[-3:]
    if snapshots != "snapshots" or not COMMIT.fullmatch(commit):
        return None
    return folder.removeprefix("models--").replace("--", "/"), commit


def _is_whole(path: str) -> bool:
    """Whether no weights are left to be fetched; other directories hold what they hold."""
    if _repo_of(path) is None:
        return True
    try:
        return bool(weight_files(Path(path)))
    except ValueError:
        return False


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Processes of a machine that ask for the same find it in the cache then, and the space on the
    disk is counted by one.
    """
    folder = Path(constants.HF_HUB_CACHE) / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / "opd.lock"):
        yield


@contextmanager
def _one_line_of_the_hub(flag: str, model: str) -> Iterator[None]:
    try:
        yield
    except errors.GatedRepoError:
        reason = "the hub gives it to those who were let in; ask on its page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "no such directory, and no such model on the hub; a private one needs HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision; name a branch, a tag or a commit after the @"
    except errors.HFValidationError:
        reason = "no such directory, and not a hub id"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        name, _, revision = model.partition("@")
        wanted = f"{name} --revision {revision}" if revision else name
        reason = (
            f"the hub cannot be asked, and the cache has not all of it ({constants.HF_HUB_CACHE}); "
            f"fetch it where there is a network: hf download {wanted}"
        )
    except (OSError, errors.HfHubHTTPError) as error:
        reason = f"the download failed: {one_line(error)}; start again, what is here is kept"
    else:
        return
    raise ValueError(f"{flag} {model}: {reason}") from None
