"""Whole runs of LoRA students: killed and resumed, exported from a checkpoint, by both trainers, in
turn with the sampler and asynchronously.
"""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.launch import command, losses_of, metrics_of, parameter_hash, start, succeed
from tests.support.processes import ROOT, worker_environment

pytestmark = pytest.mark.e2e
LORA = ("--lora_r", "8", "--learning_rate", "1e-2", "--num_steps", "4", "--save_every", "2")


def exported(checkpoint, out, *flags) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opd.export", str(checkpoint), str(out), *flags],
        cwd=ROOT,
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def full_run(models, tmp_path_factory):
    """Four steps with vLLM's own adapters."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    console = succeed(command(models, run_dir, *LORA))
    assert f"adapter: {run_dir}/model" in console
    return run_dir


def adapter_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_it_learns_and_its_sampler_is_the_student(full_run):
    """Parity is judged in every step; the weights that it stands on are never sent."""
    rows = metrics_of(full_run)[-4:]
    assert all(row["mismatch/abs_max"] < 1e-4 for row in rows)
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert any(t.abs().max() > 0 for n, t in adapter_of(full_run / "model").items() if "_B." in n)
    assert "lora" in (full_run / "model" / "README.md").read_text()


def test_killed_and_resumed_equals_undisturbed(models, full_run, tmp_path):
    run_dir = tmp_path / "run"
    killed = start(command(models, run_dir, *LORA), OPD_FAULT="train.before_step:kill@4")
    assert killed.returncode == -signal.SIGKILL
    refused = start(command(models, run_dir, *LORA, "--lora_alpha", "16"))
    assert refused.returncode == 2
    assert "--resume: `lora.lora_alpha` differs from the checkpoint" in refused.stderr
    console = succeed(command(models, run_dir, *LORA))
    assert f"resumes from {run_dir}/checkpoints/step_2" in console
    assert parameter_hash(run_dir) == parameter_hash(full_run)
    assert losses_of(run_dir) == losses_of(full_run)


def test_a_checkpoint_is_exported_as_the_run_does(full_run, tmp_path):
    last = full_run / "checkpoints" / "step_4"
    exported(last, tmp_path / "adapter")
    own, found = adapter_of(full_run / "model"), adapter_of(tmp_path / "adapter")
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    for name in ("adapter_config.json", "generation_config.json"):
        texts = [(path / name).read_text() for path in (full_run / "model", tmp_path / "adapter")]
        assert texts[0] == texts[1]
    exported(last, tmp_path / "whole", "--merge_on_export")
    ids = torch.arange(2, 14).view(1, 12)
    models = (full_run / "model", tmp_path / "whole")
    with torch.no_grad():
        adapted, whole = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
            for path in models
        )
    assert (adapted - whole).abs().max() < 1e-4
    size = sum(p.stat().st_size for p in last.rglob("*") if p.is_file())
    adapter = sum(t.nbytes for t in own.values())
    assert size < 8 * adapter + 100_000  # masters and moments beside it, and names


def test_merged_syncs_train_the_same(models, full_run, tmp_path):
    """The sampler adds up in another order, which greedy sampling of tokens does not show."""
    run_dir = tmp_path / "run"
    succeed(command(models, run_dir, *LORA, "--lora_sync", "merged", "--merge_on_export"))
    assert losses_of(run_dir) == pytest.approx(losses_of(full_run), rel=1e-4)
    assert (run_dir / "model" / "model.safetensors").exists()
    assert not (run_dir / "model" / "adapter_config.json").exists()


@pytest.mark.long
def test_gkd_on_two_ranks(models, tmp_path):
    run_dir = tmp_path / "gkd"
    flags = ("--ds_config", "ds_configs/zero2.json", "--gradient_checkpointing", "--lmbda", "0.5")
    arguments = command(
        models, run_dir, *LORA, *flags, script="train_gkd.py", launcher="torchrun", ranks=2
    )
    succeed(arguments, DS_ACCELERATOR="cpu")
    assert len(losses_of(run_dir)) == 4 and adapter_of(run_dir / "model")


@pytest.mark.long
def test_servers_get_merged_weights(models, tmp_path, full_run):
    """At staleness 0 an asynchronous run is the synchronous one."""
    run_dir = tmp_path / "ahead"
    flags = ("--mode", "async", "--max_staleness", "0")
    succeed(command(models, run_dir, *LORA, *flags), forked=False)
    assert losses_of(run_dir) == pytest.approx(losses_of(full_run), rel=1e-3)
    assert adapter_of(run_dir / "model").keys() == adapter_of(full_run / "model").keys()
