"""Rows of prompt files: JSON Lines, parquet, directories of those, or a hub data set.

Knows files, not prompts.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from opd.log import one_line

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
LFS_START = b"version https://git-lfs"
LFS_ADVICE = "a git-lfs pointer, not the file itself; fetch that with `git lfs pull`"
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


class Place(str):
    """Where a row is: flag, file and line, for messages; and the folder of its file, in which
    relative paths of images start.
    """

    __slots__ = ("folder",)

    def __new__(cls, text: str, folder: Path = Path()):
        place = super().__new__(cls, text)
        place.folder = folder
        return place


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value of a column store that Python cannot hold.

    An error only where somebody needs the value.
    """

    reason: str


def _content(path: Path, flag: str) -> bytes:
    """The bytes of a text file in UTF-8, without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot read it: {error.strerror}") from None
    if content.startswith(LFS_START):
        raise ValueError(f"{flag} {path}: {LFS_ADVICE}")
    encoding = json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):
        raise ValueError(
            f"{flag} {path}: begins as {encoding.upper()} does, not UTF-8; save it as UTF-8"
        )
    return content.removeprefix(codecs.BOM_UTF8)


def _read_json(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSON Lines file, or of a file that holds one JSON list."""
    content = _content(path, flag)
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        try:
            yield from (
                (f"{flag} {path}, row {i}", row) for i, row in enumerate(json.loads(content), 1)
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{flag} {path}: not JSON: {one_line(error)}") from None
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{flag} {path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: not JSON: {one_line(error)}; every line must be one JSON object"
            ) from None


def _holds_json(kind: pyarrow.DataType) -> bool:
    children = (kind.field(i).type for i in range(kind.num_fields))
    return isinstance(kind, pyarrow.JsonType) or any(map(_holds_json, children))


def _parse_json(value: Any, kind: pyarrow.DataType) -> Any:
    """A copy of `value` in which the text of arrow's JSON type, a string to pyarrow, is what it
    says.
    """
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_map(kind):
        return {k: _parse_json(v, kind.item_type) for k, v in value.items()}
    if pyarrow.types.is_struct(kind):
        return {field.name: _parse_json(value[field.name], field.type) for field in kind}
    return [_parse_json(item, kind.value_type) for item in value]


def _plain(cell: pyarrow.Scalar) -> Any:
    try:
        return _parse_json(cell.as_py(maps_as_pydicts="strict"), cell.type)
    # Text that is not UTF-8 or not JSON, years after 9999, unknown time zones, map keys that occur
    # twice.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError, RecursionError) as error:
        return Unreadable(one_line(error))


def _read_parquet(path: Path, flag: str) -> Iterator[tuple[str, Any]]:
    """By pyarrow and not by `datasets` 5.2, which knows fewer types (no UUID, no map) and fails on
    a file without rows.
    """
    number = 0
    try:
        with path.open("rb") as start:
            if start.read(len(LFS_START)) == LFS_START:
                raise ValueError(LFS_ADVICE)
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"it has two columns called {twice[0]}")
            for batch in file.iter_batches(1024):
                columns = [map(_plain, column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"{flag} {path}, row {number}", dict(zip(names, values, strict=True))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{flag} {path}: not a parquet file that can be read: {one_line(error)}"
        ) from None


def _read_hub(name: str, flag: str) -> Iterator[tuple[str, Any]]:
    """`owner/name`, `owner/name/config`, either with `:split` (default train)."""
    match = HUB_ID.fullmatch(name)
    if match is None or Path(name).suffix in (*JSON_SUFFIXES, ".parquet"):
        raise ValueError(f"{flag} {name}: no such file or directory")
    try:
        rows = datasets.load_dataset(
            match["name"], match["config"], split=match["split"] or "train"
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        hub = f"nor a hub data set OWNER/NAME[/CONFIG][:SPLIT]: {one_line(error)}"
        raise ValueError(f"{flag} {name}: neither a file or directory {hub}") from None
    try:  # images and the like are decoded only now
        yield from ((f"{flag} {name}, row {i}", row) for i, row in enumerate(rows, 1))
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        OSError,
        ValueError,
    ) as error:
        raise ValueError(f"{flag} {name}: a row cannot be read: {one_line(error)}") from None


def _data_files(directory: Path) -> list[Path]:
    """Sorted; .json only where there is nothing else, since beside other files it
    describes them.
    """
    for suffixes in ((".jsonl", ".ndjson", ".parquet"), (".json",)):
        files = [
            p
            for p in directory.rglob("*")
            if p.suffix in suffixes and p.is_file() and not p.name.startswith(".")
        ]
        if files:
            break
    return sorted(files)


def read_rows(paths: Sequence[str], flag: str) -> list[tuple[Place, dict[str, Any]]]:
    """(where, row) of every row of `paths`, in order; `where` names flag, file and line for error
    messages.

    A path is a JSON Lines or parquet file, a directory of those (in sorted order), or a hub id.
    """
    if not paths:
        raise ValueError(f"{flag} is required: JSONL or parquet files, directories or hub ids")
    rows: list[tuple[Place, dict[str, Any]]] = []
    for name in paths:
        path, before = Path(name).expanduser(), len(rows)
        files = [path] if path.is_file() else []
        if path.is_dir():
            files = _data_files(path)
            if not files:
                raise ValueError(
                    f"{flag} {name}: the directory holds no {', '.join(JSON_SUFFIXES)} or .parquet "
                    "file"
                )
        for file in files:
            if file.suffix not in (*JSON_SUFFIXES, ".parquet"):
                raise ValueError(
                    f"{flag} {file}: unknown file type {file.suffix!r}; use .jsonl, .json or "
                    ".parquet"
                )
            read = _read_parquet if file.suffix == ".parquet" else _read_json
            rows += ((Place(where, file.parent), row) for where, row in read(file, flag))
        if not files:
            rows += ((Place(where), row) for where, row in _read_hub(name, flag))
        if len(rows) == before:
            raise ValueError(f"{flag} {name}: empty, no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    return rows
