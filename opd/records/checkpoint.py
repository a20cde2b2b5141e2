"""Checkpoints that are whole or absent, and what a resumed run must not change.

A checkpoint is a directory `checkpoints/step_N` with a `manifest.json`: format version, step,
number of ranks, fingerprint of the run, and the size and SHA-256 of every file. It is written under
a temporary name, synced to the disk, completed by its manifest and renamed once, so that a kill at
any instant leaves the new checkpoint or none, and never touches an older one. Nothing is loaded
before all hashes were checked. Our own state is JSON; only DeepSpeed's shards are pickles, and the
hashes cover them.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from opd.distributed import agree_on_error, broadcast_object, gather_objects, rank, world_size
from opd.faults import fault_point
from opd.log import warn_once
from opd.types import LoopState

FIRST_START = "first_start"  # in the fingerprint of a run whose chat template writes the date
CHECKPOINT_MANIFEST = "manifest.json"
LOOP_STATE = "loop_state.json"
VERSION = 1  # of the layout below `checkpoints/`

# Where tests kill `save`, in order; rank 0 passes all of them, the other ranks those marked.
FAULT_POINTS = (
    "save.begin",  # every rank
    "save.tmp_made",  # every rank
    "save.shards_written",  # every rank
    "save.loop_state_written",
    "save.files_synced",  # every rank
    "save.before_manifest",  # every rank
    "save.manifest_half",
    "save.manifest_written",
    "save.before_rename",
    "save.renamed",
    "save.before_retention",  # every rank
    "save.mid_retention",
)


# ---- save ----------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    state: LoopState,
    save_parts: Callable[[Path], None],
    fingerprint: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes `checkpoints/step_N` and deletes the oldest beyond `keep`; returns the directory.

    Collective.

    `save_parts(directory)` writes this rank's part. It may hold collectives, therefore it must not
    leave them early: a write error waits until the last one is over. A whole checkpoint of the same
    step is left as it is and returned; a damaged one is replaced. Raises RuntimeError on every
    rank, after removing what was written, if any rank could not write, as on a full disk.
    """
    assert keep >= 1, keep
    checkpoints = _checkpoints(run_dir)
    final = checkpoints / f"step_{state.step}"
    if broadcast_object(final.exists()):
        _, reason = _verify(final)
        if reason is None:
            warn_once(
                f"checkpoint: {final} exists already and is whole; it is kept and nothing is "
                "written"
            )
            return final
        warn_once(f"checkpoint: {final} is damaged and will be replaced: {reason}")

    with _temporary(final) as tmp:
        manifest = {
            "version": VERSION,
            "step": state.step,
            "world_size": world_size(),
            "fingerprint": fingerprint,
        }
        manifest["files"] = _write_files(tmp, state, save_parts)
        _write_manifest(tmp, manifest)
        _publish(tmp, final)
    with agree_on_error("deleting old checkpoints"):
        fault_point("save.before_retention")
        if rank() == 0:
            _retain(checkpoints, state.step, keep)
    return final


@contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """A new directory beside `final` that all ranks know, removed on an error, locked as long as
    its run lives.
    """
    tmp, lock = final, -1
    try:
        with agree_on_error(f"making a directory in {final.parent}"):
            fault_point("save.begin")
            if rank() == 0:
                final.parent.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(final.parent)
                tmp = final.parent / f".tmp_{final.name}.{secrets.token_hex(4)}"
                tmp.mkdir()
                lock = os.open(tmp, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
        tmp = broadcast_object(tmp)
        with agree_on_error(f"using {tmp}"):
            fault_point("save.tmp_made")
        yield tmp
    except (RuntimeError, ValueError) as error:
        if rank() == 0 and tmp != final:
            shutil.rmtree(tmp, ignore_errors=True)
        raise RuntimeError(
            f"checkpoint {final} was not written; older ones are untouched: {error}"
        ) from error
    finally:
        if lock >= 0:
            os.close(lock)


def _write_files(
    tmp: Path, state: LoopState, save_parts: Callable[[Path], None]
) -> list[dict[str, Any]]:
    """All files but the manifest, on the disk.

    Returns [{file, size, sha256}], the same on every rank.
    """
    with agree_on_error("writing the shards"):
        save_parts(tmp)
        fault_point("save.shards_written")
    with agree_on_error(f"writing {LOOP_STATE}"):
        if rank() == 0:
            (tmp / LOOP_STATE).write_text(json.dumps(dataclasses.asdict(state)))
            fault_point("save.loop_state_written")
    entries: list[dict[str, Any]] = []
    with agree_on_error("syncing the files"):
        found = [
            {"file": str(p.relative_to(tmp)), "size": p.stat().st_size}
            for p in tmp.rglob("*")
            if p.is_file()
        ]
        for entry in _share(found):
            fsync(tmp / entry["file"])
            entries.append({**entry, "sha256": _sha256(tmp / entry["file"])})
        fault_point("save.files_synced")
    return sorted((e for part in gather_objects(entries) for e in part), key=lambda e: e["file"])


def _write_manifest(tmp: Path, manifest: dict[str, Any]) -> None:
    with agree_on_error(f"writing {CHECKPOINT_MANIFEST}"):
        fault_point("save.before_manifest")
        if rank() == 0:
            text = _manifest_text(manifest)
            with open(tmp / CHECKPOINT_MANIFEST, "w") as file:
                file.write(text[: len(text) // 2])
                file.flush()
                fault_point("save.manifest_half")
                file.write(text[len(text) // 2 :])
                file.flush()
                fault_point("save.manifest_written")
                os.fsync(file.fileno())
            for directory in (tmp, *(p for p in tmp.rglob("*") if p.is_dir())):
                fsync(directory)


def _publish(tmp: Path, final: Path) -> None:
    with agree_on_error(f"renaming {tmp}"):
        if rank() == 0:
            fault_point("save.before_rename")
            if final.exists():
                shutil.rmtree(_to_trash(final), ignore_errors=True)
            os.rename(tmp, final)
            fault_point("save.renamed")
            fsync(final.parent)


def _retain(checkpoints: Path, step: int, keep: int) -> None:
    """Deletes the oldest.

    Only complete ones up to `step` count, so that a damaged one never pushes a whole one out.
    """
    complete = [p for n, p in _steps(checkpoints) if n <= step and _quick_defect(p) is None]
    for path in complete[keep:]:
        try:
            trash = _to_trash(path)
        except OSError as error:  # the new checkpoint is in place; the next save tries again
            warn_once(f"checkpoint: could not delete {path}: {error}")
            continue
        fault_point("save.mid_retention")
        shutil.rmtree(trash, ignore_errors=True)


# ---- find ----------------------------------------------------------------------------------------


def find(run_dir: Path, resume: str, *, any_number: bool = False) -> Path | None:
    """The checkpoint to resume from; None is a fresh start.

    Collective, the same answer on every rank.

    `resume` is `auto` (the newest whole one; each that is skipped is named, with the reason),
    `never`, or a path. Every hash is checked here, divided over the ranks, before anything is
    loaded. Raises ValueError if the path is not a whole checkpoint, or was written by another
    number of ranks, unless `any_number` says that this one can load it.
    """
    if resume == "never":
        return None
    candidates = []
    with agree_on_error(f"reading {_checkpoints(run_dir)}"):
        if rank() == 0:
            _remove_leftovers(_checkpoints(run_dir))
            candidates = [path for _, path in _steps(_checkpoints(run_dir))]
    for path in broadcast_object(candidates) if resume == "auto" else [Path(resume)]:
        if resume != "auto":
            manifest, reason = check_whole(path, "--resume"), None
        else:
            manifest, reason = _verify(path)
        if reason is None:
            if not any_number:
                _check_world_size(path, manifest["world_size"])
            return path
        warn_once(f"checkpoint: skipped {path}: {reason}")
    return None


def check_whole(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of the checkpoint that `flag` names; ValueError if not whole. Collective."""
    manifest, reason = _verify(path)
    if reason is not None:
        others = ", or use --resume auto" if flag == "--resume" else ""
        raise ValueError(f"{flag} {path}: not a whole checkpoint: {reason}; name another{others}")
    return manifest


def first_start(run_dir: Path, resume: str) -> datetime:
    """When the run began that this one continues, in local time, if its checkpoints say so, else
    now. Collective.

    A resumed run must know it before `find`: chat templates write the date. All checkpoints of a
    run say the same, so nothing is hashed here, and nothing is an error.
    """
    kept = None
    with agree_on_error(f"reading {_checkpoints(run_dir)}"):
        if rank() == 0 and resume != "never":
            paths = (
                [path for _, path in _steps(_checkpoints(run_dir))]
                if resume == "auto"
                else [Path(resume)]
            )
            fingerprints = (_read_manifest(path)[0].get("fingerprint", {}) for path in paths)
            kept = next((f[FIRST_START] for f in fingerprints if FIRST_START in f), None)
    return broadcast_object(
        datetime.fromisoformat(kept) if kept else datetime.now().replace(microsecond=0)
    )


def set_aside_newer(run_dir: Path, resumed: Path | None) -> None:
    """Moves the steps that are not this run's past, those newer than `resumed`, to
    `checkpoints/aside`. Collective.

    To be called once all checks of a resume have passed. Without it a run that went back to an
    older step, or started afresh, would meet the steps of its former life when it saves, and resume
    from them after a kill. None, and a checkpoint of another run directory, leave no step in place.
    """
    checkpoints = _checkpoints(run_dir)
    with agree_on_error(f"setting aside checkpoints in {checkpoints}"):
        if rank() == 0:
            past = [
                n
                for n, path in _steps(checkpoints)
                if resumed is not None and path.resolve() == resumed.resolve()
            ]
            for path in [p for n, p in _steps(checkpoints) if not past or n > past[0]]:
                target = checkpoints / "aside" / f"{path.name}.{secrets.token_hex(4)}"
                target.parent.mkdir(exist_ok=True)
                os.rename(path, target)
                warn_once(f"checkpoint: {path} is not part of this run's past; moved to {target}")


def load_state(path: Path) -> LoopState:
    """The loop state of a checkpoint that `find` returned."""
    return LoopState(**json.loads((path / LOOP_STATE).read_text()))


def _check_world_size(path: Path, saved: int) -> None:
    if saved != world_size():
        raise ValueError(
            f"--resume: {path} was written by {saved} rank(s) and this run has {world_size()}; "
            f"only shards of ZeRO stage 3 can be divided anew: start {saved}, or use another "
            "--output_dir"
        )


# ---- what whole means ----------------------------------------------------------------------------


def _verify(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest and the first defect, or None.

    Collective: each rank hashes its share of the bytes.
    """
    manifest, reason = broadcast_object(_read_manifest(path) if rank() == 0 else None)
    if reason is not None:
        return {}, reason
    defects = (_file_defect(path, entry) for entry in _share(manifest["files"]))
    reasons = gather_objects(next((d for d in defects if d is not None), None))
    return manifest, next((r for r in reasons if r is not None), None)


def _quick_defect(path: Path) -> str | None:
    """Without hashes, without collectives."""
    manifest, reason = _read_manifest(path)
    sizes = (_size_defect(path, entry) for entry in manifest.get("files", ()))
    return reason or next((d for d in sizes if d is not None), None)


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.is_dir():
        return {}, "no such directory"
    try:
        text = (path / CHECKPOINT_MANIFEST).read_bytes().decode()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        return (
            {},
            f"{CHECKPOINT_MANIFEST}: "
            f"{'missing' if isinstance(error, FileNotFoundError) else error}",
        )
    if not isinstance(content, dict) or _manifest_text(content) != text:
        return {}, f"{CHECKPOINT_MANIFEST}: its own hash does not match"
    if content["version"] != VERSION:
        return (
            {},
            f"{CHECKPOINT_MANIFEST}: version {content['version']}, this program reads {VERSION}",
        )
    named = re.fullmatch(r"step_(\d+)", path.name)
    if named and int(named[1]) != content["step"]:
        return (
            {},
            f"{CHECKPOINT_MANIFEST}: it is of step {content['step']}; the directory was renamed",
        )
    return content, None


def _manifest_text(content: dict[str, Any]) -> str:
    """One canonical text: a reader writes what it has read and compares, so that any changed byte
    shows.
    """
    body = {k: v for k, v in content.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def _size_defect(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = (path / entry["file"]).stat().st_size
    except OSError as error:
        return f"{entry['file']}: {'missing' if isinstance(error, FileNotFoundError) else error}"
    return (
        None
        if size == entry["size"]
        else f"{entry['file']}: {size} bytes instead of {entry['size']}"
    )


def _file_defect(path: Path, entry: dict[str, Any]) -> str | None:
    defect = _size_defect(path, entry)
    if defect is not None:
        return defect
    try:
        digest = _sha256(path / entry["file"])
    except OSError as error:
        return f"{entry['file']}: {error}"
    return None if digest == entry["sha256"] else f"{entry['file']}: its hash does not match"


# ---- directories and files -----------------------------------------------------------------------


def _checkpoints(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """(N, directory) of every `step_N`, newest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    matches = [
        (re.fullmatch(r"step_(\d+)", p.name), p) for p in checkpoints.iterdir() if p.is_dir()
    ]
    return sorted(((int(m[1]), p) for m, p in matches if m), reverse=True)


def _to_trash(path: Path) -> Path:
    """Renames before deleting: a directory that is half deleted must not look like a checkpoint."""
    trash = path.with_name(f".trash_{path.name}.{secrets.token_hex(4)}")
    os.rename(path, trash)
    fsync(path.parent)
    return trash


def _remove_leftovers(checkpoints: Path) -> None:
    """Deletes what dead runs left.

    The kernel drops a dead process's lock; a live one's directory stays locked.
    """
    for path in (*checkpoints.glob(".tmp_step_*"), *checkpoints.glob(".trash_step_*")):
        with suppress(BlockingIOError, FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _share(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This rank's part of the files, the bytes spread evenly."""
    return sorted(entries, key=lambda e: (-e["size"], e["file"]))[rank() :: world_size()]


def fsync(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
