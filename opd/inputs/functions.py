"""Functions that the user names as `module:function`."""

import functools
import importlib
import os
import sys
from collections.abc import Callable

from opd.log import one_line


def import_function(flag: str, name: str) -> Callable:
    """The function `module:function`, with the module importable from the working directory. Where
    it would end the program it raises RuntimeError: a run that it ended would seem to be finished.

    ValueError, which begins with `flag`, if there is none.
    """
    module_name, _, function_name = name.partition(":")
    # a script's own directory is on the path, the directory it is started from is not
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise ValueError(f"{flag}: cannot import {module_name}: {one_line(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{flag}: {module_name} has no function {function_name}")

    @functools.wraps(function)
    def called(*args):
        try:
            return function(*args)
        except SystemExit as error:
            raise RuntimeError(f"{name} called sys.exit({error.code!r})") from error

    return called
