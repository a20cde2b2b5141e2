"""Metrics at Weights & Biases (`--report_to wandb`), an optional package.

Whatever goes wrong there is a warning, and ends this reporting only.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd.log import one_line, redact, warn_once
from opd.records.files import replace_text

PROJECT = "opd"  # unless WANDB_PROJECT names another
# Seconds; without a key or a network wandb would wait longer, or ask at the terminal.
SETTINGS = {
    "silent": True, "console": "off", "init_timeout": 60, "login_timeout": 30, "finish_timeout": 120
}  # fmt: skip


class WandbRun:
    """A run of wandb, on rank 0, begun with the first row; `wandb_id` in the run directory names
    it, so that a resumed run continues it.

    `config` is what is shown as its configuration, without secrets.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        self._run_dir, self._config = run_dir, config
        self._run = None
        self._failed = False

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Sends the metrics of a step. A resumed run repeats steps: wandb keeps the first value."""
        self._try(lambda: self._begun().log(dict(row), step=step))

    def close(self) -> None:
        """Waits until all is sent, for 2 minutes at most."""
        if self._run is not None:
            self._try(self._run.finish)
            self._run = None

    def _try(self, work: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # no failure of a service of others may stop a run
            self._failed = True
            warn_once(
                f"--report_to wandb: stopped: {redact(one_line(error))}; metrics.jsonl has all "
                "steps"
            )

    def _begun(self):
        if self._run is None:
            import wandb  # slow, and only rank 0 needs it

            known = wandb.Settings.model_fields
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", self._run_dir.absolute().name),
                dir=str(self._run_dir),
                id=self._id(),
                resume="allow",
                config=dict(self._config),
                settings=wandb.Settings(**{k: v for k, v in SETTINGS.items() if k in known}),
            )
        return self._run

    def _id(self) -> str:
        path = self._run_dir / "wandb_id"
        if not path.exists():
            replace_text(path, secrets.token_hex(8))
        return path.read_text().strip()
