"""Where curves go: `--report_to`. wandb is a stand-in of the same calls; where the real package is
installed it is tried too, offline.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from opd.inputs.arguments import trackers_of
from opd.inputs.validation import check_wandb
from opd.records.metrics import Metrics


def make(run_dir: Path, *trackers: str, **options) -> Metrics:
    return Metrics(run_dir, num_steps=3, domains=[], trackers=trackers, **options)


def flush(metrics: Metrics, step: int) -> None:
    metrics.add("loss/total", float(step))
    metrics.flush(step)


class Run:
    def __init__(self, failure=None):
        self.failure, self.rows, self.finished = failure, [], 0

    def log(self, row, step):
        if self.failure:
            raise self.failure
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """Begun runs and their options, in the order of `init`."""
    module = types.ModuleType("wandb")
    module.begun, module.failures = [], {}

    class Settings(types.SimpleNamespace):
        model_fields = ("silent", "console", "init_timeout")

    def init(**options):
        if error := module.failures.get("init"):
            raise error
        module.begun.append((options, Run(module.failures.get("log"))))
        return module.begun[-1][1]

    module.Settings, module.init = Settings, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tensorboard", {"tensorboard"}),
        ("tensorboard, wandb", {"tensorboard", "wandb"}),
        ("none", set()),
    ],
)
def test_names_of_the_flag(text, names):
    assert trackers_of(text) == names


@pytest.mark.parametrize("text", ["wanbd", "", "tensorboard,,wandb", "none,wandb", "all"])
def test_other_names_are_one_line(text):
    with pytest.raises(ValueError, match=f"^--report_to {text}: "):
        trackers_of(text)


def test_wandb_is_asked_for_and_missing(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_wandb("tensorboard")
    for _ in range(2):
        with pytest.raises(ValueError, match="pip install wandb"):
            check_wandb("tensorboard,wandb")
        (tmp_path / "wandb").mkdir(exist_ok=True)  # what earlier runs left: no package
        importlib.invalidate_caches()
    (tmp_path / "wandb" / "__init__.py").touch()
    importlib.invalidate_caches()
    check_wandb("tensorboard,wandb")


def test_none_writes_metrics_alone(tmp_path):
    metrics = make(tmp_path)
    flush(metrics, 0)
    metrics.text("rollout/a", "text", 0)
    metrics.histogram("rollout/a", [1.0], 0)
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_gets_every_row_and_no_secret(wandb, tmp_path):
    config = {"loss": "jsd", "hf_token": "canary", "urls": ["http://me:canary@host"]}
    metrics = make(tmp_path / "run", "wandb", config=config)
    flush(metrics, 0)
    flush(metrics, 1)
    metrics.close()
    ((options, run),) = wandb.begun
    assert run.rows == [(0, {"loss/total": 0.0}), (1, {"loss/total": 1.0})] and run.finished == 1
    assert options["config"]["loss"] == "jsd" and "canary" not in str(options)
    assert (options["project"], options["name"]) == ("opd", "run")
    assert vars(options["settings"]).keys() == {"silent", "console", "init_timeout"}
    assert not (tmp_path / "run" / "tb").exists()


def test_a_resumed_run_continues_the_run_of_wandb(wandb, tmp_path):
    for step in (0, 1):
        metrics = make(tmp_path / "run", "wandb")
        flush(metrics, step)
        metrics.close()
    first, second = (options for options, _ in wandb.begun)
    assert first["id"] == second["id"] and len(first["id"]) == 16
    assert first["resume"] == second["resume"] == "allow"
    flush(make(tmp_path / "other", "wandb"), 0)
    assert wandb.begun[2][0]["id"] != first["id"]


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_failure_of_wandb_is_one_warning(wandb, tmp_path, where, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-the-key")
    wandb.failures[where] = RuntimeError("canary-of-the-key\nis wrong")
    metrics = make(tmp_path, "wandb")
    flush(metrics, 0)
    flush(metrics, 1)
    metrics.close()
    shown = capsys.readouterr()
    assert shown.err.count("warning") == 1 and "--report_to wandb: stopped: *** is" in shown.err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is optional")
def test_the_real_package_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 1):
        metrics = make(tmp_path, "wandb", config={"loss": "jsd"})
        flush(metrics, step)
        metrics.close()
        assert metrics._wandb._failed is False
    name = (tmp_path / "wandb_id").read_text()
    written = list(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert written and all(b"loss/total" in path.read_bytes() for path in written)
