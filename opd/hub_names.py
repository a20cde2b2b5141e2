"""Names of models that lie in the cache of the Hugging Face hub."""

import re

SNAPSHOT = re.compile(r"[^\s'\"]*/models--([^/\s]+)/snapshots/([0-9a-f]{40})")


def as_named(text: str) -> str:
    """Text in which directories of the hub's cache are the models that they hold.

    Example: ".../hub/models--Qwen--Qwen3-4B/snapshots/1cfa..." is "Qwen/Qwen3-4B@1cfa...".
    """
    return SNAPSHOT.sub(lambda found: f"{found[1].replace('--', '/')}@{found[2]}", text)
