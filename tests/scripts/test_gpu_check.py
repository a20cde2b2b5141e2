"""The GPU check as a machine without a GPU runs it: every section that a CPU can run, and those
that say what they need.
"""

import argparse
import importlib
import json
import subprocess
import sys

import pytest
import torch

from scripts import gpu_check
from scripts.measure import gpu_engines
from tests.support.processes import ROOT, worker_environment

GPU_ONLY = ("copies", "offload", "teachers")
BARE = """
import importlib.machinery

found = importlib.machinery.PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {absent} else found(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def test_torch_and_transformers_are_enough(tmp_path):
    """What is not installed is said so, and is no failure.

    This project is not installed either, where it runs from its own directory.
    """
    absent = ("vllm", "deepspeed", "accelerate", "datasets", "tensorboard", "pytest", "peft")
    (tmp_path / "sitecustomize.py").write_text(BARE.format(absent=absent))
    output = tmp_path / "cpu.json"
    run = subprocess.run(
        [sys.executable, gpu_check.__file__, "--device", "cpu", "--output", str(output)],
        env=worker_environment(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert result["sleep"]["missing"] == result["parity"]["missing"] == ["vllm", "accelerate"]
    assert result["step"]["status"] == "not installed" and "deepspeed" in result["step"]["missing"]
    assert all(result[name] == {"status": "needs a GPU"} for name in GPU_ONLY)
    for name, products in (("loss", 4), ("scoring", 1)):
        (row,) = result[name]["rows"]
        assert result[name]["status"] == "ok" and row["share_of_matmul_ceiling"] > 0
        flops = 2 * products * row["N"] * row["H"] * row["V"]
        assert row["tflop_s"] == pytest.approx(flops / row["ours_ms"] / 1e9, abs=0.01)
    lines = run.stdout.splitlines()
    assert len(lines) == 1 + len(gpu_check.SECTIONS)
    assert lines[0].split() == ["section", "status", "seconds", "result"]
    assert result["machine"]["torch"] == torch.__version__ and result["size"] == "tiny"


def check(monkeypatch, tmp_path, flags: str) -> tuple[int, dict]:
    """(status, the JSON file) of a run on the CPU, in this process."""
    output = tmp_path / "cpu.json"
    arguments = ["gpu_check.py", "--device", "cpu", "--output", str(output), *flags.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    return gpu_check.main(), json.loads(output.read_text())


@pytest.mark.e2e
def test_engines_and_a_step_on_a_cpu(monkeypatch, run_main, tmp_path):
    status, result = check(monkeypatch, tmp_path, "--sections sleep parity step")
    assert status == 0, json.dumps(result, indent=2)[-4000:]
    rows = result["sleep"]["rows"]
    assert [(row["engine"], row["round"]) for row in rows] == [
        (n, i) for n in ("rollout", "host", "disk") for i in (0, 1)
    ]
    for row in rows:
        assert row["ok"] and row["canary_difference"] < 1e-4 and row["freed_gib"] is None
    assert result["parity"]["tokens"] == 4 * 8 and result["parity"]["largest_difference"] < 1e-4
    phases = ("rollout", "score", "train", "sync")
    step = result["step"]["metrics"]
    assert step["time/step"] >= sum(step[f"time/{phase}"] for phase in phases)
    assert {line["phase"] for line in result["step"]["ledger"]} >= set(phases)


# ---- Pieces --------------------------------------------------------------------------------------


def test_a_section_that_fails_says_why_and_the_rest_goes_on(monkeypatch, tmp_path):
    status, result = check(monkeypatch, tmp_path, "--sections loss copies --timeout 0.01")
    assert status == 1
    assert result["loss"]["status"] == "failed" and result["loss"]["error"] == "no end after 0 s"
    assert result["copies"]["status"] == "needs a GPU"


def test_an_error_of_a_process_is_its_last_word(monkeypatch, tmp_path):
    def error_of(code: str) -> str | None:
        program = tmp_path / "section.py"
        program.write_text(code)
        monkeypatch.setattr(gpu_check, "__file__", str(program))
        args = argparse.Namespace(size="tiny", timeout=60)
        return gpu_check.run_section("loss", args, "cpu").get("error")

    answers = "import sys; open(sys.argv[sys.argv.index('--answer') + 1], 'w').write('{}')"
    assert error_of(answers) is None
    assert error_of("raise MemoryError('too large')") == "exit status 1: MemoryError: too large"
    assert error_of("import os; os.abort()") == "exit status -6: no output"


def test_a_result_that_is_not_ok_is_a_failure(monkeypatch):
    def answers(command, log, env, timeout_s):
        log.write_text("")
        log.with_name("answer.json").write_text(
            json.dumps({"ok": False, "headline": "canary within 3"})
        )

    monkeypatch.setattr(gpu_check, "run_child", answers)
    result = gpu_check.run_section("loss", argparse.Namespace(size="tiny", timeout=1), "cpu")
    assert result["status"] == "failed" and result["headline"] == "canary within 3"
    assert "canary within 3" in gpu_check.report({"loss": result})


def test_the_file_is_named_after_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert (
        gpu_check.default_output("cuda") == ROOT / "docs" / "results" / "nvidia-h100-80gb-hbm3.json"
    )
    assert gpu_check.default_output("cpu") is None


def test_every_section_names_a_function():
    for section in gpu_check.SECTIONS.values():
        module = importlib.import_module(f"scripts.measure.{section.module}")
        assert callable(getattr(module, section.function)), section
    for size in gpu_check.SIZES.values():
        assert size.teachers[0] == max(size.teachers), "the largest comes first"


def test_a_wake_is_held_against_a_copy(monkeypatch):
    rows = [
        {"engine": "host", "round": 0, "host_gib": 2.0, "wake_s": 9.0},
        {"engine": "host", "round": 1, "host_gib": 2.0, "wake_s": 0.1},
    ]
    monkeypatch.setattr(gpu_engines, "measure_copies", lambda size, device: {"to_gpu_gb_s": 50.0})
    found = gpu_engines.against_copies(rows, None, "cuda")
    assert found["wake_gb_s"] == pytest.approx(2 * 2**30 / 1e9 / 0.1, abs=0.01)
    assert found["share_of_copy_bandwidth"] == pytest.approx(0.429, abs=1e-3)


def test_an_engine_that_woke_up_different_is_caught():
    engine = argparse.Namespace(sleep=lambda: None, bytes_awake=2**30, memory=None)
    for after, ok in ((1.0, True), (1.1, False)):
        known, says = torch.tensor([0.0, 1.0]), torch.tensor([0.0, after])
        row = gpu_engines.cycle("math", engine, lambda says=says: says, known, lambda: None, "cpu")
        assert row["ok"] is ok and row["holds_gib"] == 1.0
        assert row["canary_difference"] == pytest.approx(after - 1.0, abs=1e-3)
