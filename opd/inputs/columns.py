"""The values of a row's columns as a run needs them: text, a domain, JSON.

What cannot be one is an error of one line.
"""

import json
import math
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from opd.inputs.rows import Unreadable
from opd.log import cut, one_line

MAX_DEPTH = (
    100  # of lists and objects inside each other; Python itself gives up somewhat below 1000
)
EXACT_FLOAT = 2**53  # a whole number below it has one float


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def column(where: str, row: dict[str, Any], key: str, key_flag: str) -> Any:
    """The value of a column that must be there."""
    if row.get(key) is None:
        problem, names = "is null" if key in row else "is missing", " ".join(", ".join(row).split())
        raise ValueError(
            f"{where}: column `{key}` {problem}; the row has {names}; choose with {key_flag}"
        )
    return checked_value(where, row, key)


def checked_value(where: str, row: dict[str, Any], key: str) -> Any:
    """The value of a column that may be absent: None then.

    ValueError for what no text, and no program, can hold.
    """
    value = row.get(key)
    waiting, depth = [value], 0
    while waiting and depth <= MAX_DEPTH:
        below: list[Any] = []
        for item in waiting:
            if isinstance(item, Unreadable):
                raise ValueError(f"{where}: column `{key}` cannot be read: {item.reason}")
            if isinstance(item, str) and not _can_be_written(item):
                raise ValueError(
                    f"{where}: column `{key}`: half a surrogate pair, which is no character; mend "
                    "the row"
                )
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                below += item
        waiting, depth = below, depth + 1
    if waiting:
        raise ValueError(
            f"{where}: column `{key}`: more than {MAX_DEPTH} lists and objects inside each other"
        )
    return value


def to_text(value: Any) -> str:
    """The one text of a value: JSON of what JSON knows, and of the other types of column stores as
    below.

    A number has the same text in every file format: a column store with a missing value turns 3
    into 3.0. Decimals keep their places and have no exponent; dates and times are as in ISO 8601,
    durations as H:MM:SS; bytes must be UTF-8. Raises ValueError with the reason alone.
    """
    match value:
        case str():
            return value
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is no value; write it as text, or leave the row out")
        case float() if value.is_integer() and abs(value) < EXACT_FLOAT:
            return str(int(value))
        case Decimal():
            return format(value, "f")
        case date() | time():
            return value.isoformat()
        case timedelta():  # a plain one: that of pandas has a text of its own
            return str(timedelta(value.days, value.seconds, value.microseconds))
        case UUID():
            return str(value)
        case bytes():
            return _decoded(value)
        case bool() | int() | float() | list() | tuple() | dict():
            return _to_json(value)
    raise ValueError(f"{cut(value)} has no text; write it as text")


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the bytes {cut(value)} are not UTF-8; write them as text") from None


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=to_text)
    except TypeError as error:  # keys of a map that are no text
        raise ValueError(f"{cut(value)}: {one_line(error)}; write it as text") from None


def text_column(
    where: str, row: dict[str, Any], key: str, key_flag: str, *, is_needed: bool
) -> str | None:
    """The column as text. Without need for it, None where it is absent or has no text."""
    if not is_needed:
        try:
            value = checked_value(where, row, key)
            return None if value is None else to_text(value)
        except ValueError:
            return None
    value = column(where, row, key, key_flag)
    try:
        return to_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: column `{key}`: {error}") from None


def domain_column(where: str, row: dict[str, Any], key: str) -> str:
    """The column that names the row's domain: 3, 3.0 and "3" are one."""
    value = column(where, row, key, "--domain_key")
    try:
        domain = str(value) if isinstance(value, bool) else to_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: column `{key}` must name the row's domain: {error}") from None
    if isinstance(value, list | tuple | dict) or not domain.strip():
        raise ValueError(f"{where}: column `{key}` must name the row's domain, got {cut(value)}")
    return domain


def json_column(where: str, row: dict[str, Any], key: str) -> Any:
    """The column as JSON; text, also inside a list, is JSON written down.

    None where it is absent or blank.

    What is no text has no nulls in objects: see `without_nulls`.
    """
    value = checked_value(where, row, key)
    if isinstance(value, str):
        return _parsed(where, key, value)
    if isinstance(value, list):
        return [
            _parsed(where, key, item) if isinstance(item, str) else without_nulls(item)
            for item in value
        ]
    return without_nulls(value)


def _parsed(where: str, key: str, text: str) -> Any:
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: column `{key}`: text that is not JSON: {one_line(error)}"
        ) from None
    return checked_value(where, {key: value}, key)


def without_nulls(value: Any) -> Any:
    """A copy without the keys that are null, at any depth: a column store gives every object the
    keys of all others.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
