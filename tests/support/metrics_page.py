"""The keys of docs/metrics.md."""

import re
from pathlib import Path


def documented_keys(path: Path) -> dict[str, re.Pattern]:
    """The keys of docs/metrics.md as written there -> what a run may emit for them."""
    keys = re.findall(r"^\| `([a-z]+/[^`]+)` \|", path.read_text(), flags=re.M)
    assert len(keys) == len(set(keys)), "a key is documented twice"
    forms = {r"\[/domain\]": "(/.+)?", "/domain": "/.+", "/TEACHER": "/.+", "/LAG": r"/\d+"}
    patterns = {key: re.escape(key) for key in keys}
    for written, emitted in forms.items():
        patterns = {key: pattern.replace(written, emitted) for key, pattern in patterns.items()}
    return {key: re.compile(pattern) for key, pattern in patterns.items()}


def undocumented(keys, patterns: dict[str, re.Pattern]) -> set[str]:
    return {key for key in keys if not any(pattern.fullmatch(key) for pattern in patterns.values())}
