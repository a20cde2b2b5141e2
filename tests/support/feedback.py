"""Functions that make a teacher's prompt of a prompt and its response, good ones and bad ones."""

import sys


def hint(prompt, response: str) -> str | None:
    """What the response begins with, the answer and the question; nothing for questions of an odd
    length.
    """
    is_odd = len(prompt.text) % 2
    return None if is_odd else f"{response[:3]}+{prompt.answer}={prompt.text}"


def raises(prompt, response: str) -> str:
    """Fails in two lines."""
    raise KeyError("no\nanswer")


def gives_a_number(prompt, response: str) -> int:
    """Gives what is no text."""
    return len(response)


def gives_nothing(prompt, response: str) -> str:
    """Gives a blank text."""
    return " "


def gives_half_a_character(prompt, response: str) -> str:
    """Gives what cannot be written."""
    return "\ud800"


def exits(prompt, response: str) -> str:
    """Ends the program, as scripts do."""
    sys.exit(0)


not_a_function = 3
