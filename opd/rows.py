"""Rows of prompt files: JSON Lines, parquet, directories of those, or a hub data set. Knows files, not prompts."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


def one_line(error: Exception) -> str:
    """The message of a library's exception, cut to what fits into a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_json(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSON Lines file, or of a file that holds one JSON list."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot read it: {error.strerror}") from None
    if path.suffix == ".json" and next((line for line in lines if line.strip()), b"").lstrip().startswith(b"["):
        try:
            yield from ((f"{flag} {path}, row {i}", row) for i, row in enumerate(json.loads(b"\n".join(lines)), 1))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{flag} {path}: not JSON: {one_line(error)}") from None
        return
    for number, line in enumerate(lines, 1):
        where = f"{flag} {path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {one_line(error)}; every line must be one JSON object") from None


def _read_parquet(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    try:  # streaming: nothing is copied into a cache, so a rewritten file is never read from an old copy
        rows = datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        yield from ((f"{flag} {path}, row {i}", row) for i, row in enumerate(rows, 1))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: not a parquet file: {one_line(error)}") from None


def _read_hub(name: str, flag: str) -> Iterator[tuple[str, Any]]:
    """`owner/name`, `owner/name/config`, either with `:split` (default train)."""
    match = HUB_ID.fullmatch(name)
    if match is None or Path(name).suffix in (*JSON_SUFFIXES, ".parquet"):
        raise ValueError(f"{flag} {name}: no such file or directory")
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        hub = f"nor a hub data set OWNER/NAME[/CONFIG][:SPLIT]: {one_line(error)}"
        raise ValueError(f"{flag} {name}: neither a file or directory {hub}") from None
    return ((f"{flag} {name}, row {i}", row) for i, row in enumerate(rows, 1))


def _data_files(directory: Path) -> list[Path]:
    """Sorted; .json only where there is nothing else, since beside other files it describes them."""
    for suffixes in ((".jsonl", ".ndjson", ".parquet"), (".json",)):
        files = [p for p in directory.rglob("*") if p.suffix in suffixes and p.is_file() and not p.name.startswith(".")]
        if files:
            break
    return sorted(files)


def read_rows(paths: Sequence[str], flag: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of `paths`, in order; `where` names flag, file and line for error messages.

    A path is a JSON Lines or parquet file, a directory of those (in sorted order), or a hub id.
    """
    if not paths:
        raise ValueError(f"{flag} is required: JSONL or parquet files, directories or hub ids")
    rows: list[tuple[str, dict[str, Any]]] = []
    for name in paths:
        path, before = Path(name).expanduser(), len(rows)
        files = [path] if path.is_file() else []
        if path.is_dir():
            files = _data_files(path)
            if not files:
                raise ValueError(f"{flag} {name}: the directory holds no {', '.join(JSON_SUFFIXES)} or .parquet file")
        for file in files:
            if file.suffix not in (*JSON_SUFFIXES, ".parquet"):
                raise ValueError(f"{flag} {file}: unknown file type {file.suffix!r}; use .jsonl, .json or .parquet")
            rows += _read_parquet(file, flag) if file.suffix == ".parquet" else _read_json(file, flag)
        if not files:
            rows += _read_hub(name, flag)
        if len(rows) == before:
            raise ValueError(f"{flag} {name}: empty, no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    return rows
