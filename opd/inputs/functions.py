"""Functions that the user names as `module:function`."""

import importlib
import os
import sys
from collections.abc import Callable

from opd.log import one_line


def import_function(flag: str, name: str) -> Callable:
    """The function `module:function`, with the module importable from the working directory.

    ValueError, which begins with `flag`, if there is none.
    """
    module_name, _, function_name = name.partition(":")
    # a script's own directory is on the path, the directory it is started from is not
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        raise ValueError(f"{flag}: cannot import {module_name}: {one_line(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{flag}: {module_name} has no function {function_name}")
    return function
