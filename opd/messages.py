"""How a value and another library's error stand in a message of one line."""

from typing import Any


def one_line(error: Exception) -> str:
    """The message of a library's exception, cut to what fits into a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def cut(value: Any) -> str:
    """A value as Python writes it, cut to 80 characters."""
    return f"{value!r:.80}"
