"""Whole runs of train_mopd.py whose teachers are adapters on one base, or the student as it was."""

import json

import pytest
from safetensors.torch import load_file

from opd.inputs.content import content_hash
from tests.support.adapters import make_adapter
from tests.support.launch import (
    Models,
    command,
    ledger_of,
    losses_of,
    metrics_of,
    parameter_hash,
    succeed,
)

pytestmark = pytest.mark.e2e


def models_of(tiny, teachers):
    return Models(tiny.student, teachers, (str(tiny.train),), tiny.eval)


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny.addition, root / name, seed=place)
        for place, name in enumerate(("first", "second"))
    }


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_two_adapters_and_their_base_are_one_engine(backend, tiny, adapters, tmp_path):
    """A mixture of all three in one step: each wakes with the others, and says its own."""
    entries = [
        {"name": "base", "model": str(tiny.addition), "domains": "*", "weight": 1},
        *(
            {
                "name": name,
                "model": str(tiny.addition),
                "adapter": str(path),
                "domains": "*",
                "weight": 2,  # it is the one whose own answers are judged
            }
            for name, path in adapters.items()
        ),
    ]
    config = tmp_path / "teachers.yaml"
    config.write_text(json.dumps({"teachers": entries, "teacher_backend": backend}))
    run_dir = tmp_path / "run"
    residency = ("--teacher_residency", "disk") if backend == "hf" else ()
    eval_flags = ("--eval_data", str(tiny.eval), "--eval_max_prompts", "2")
    out = succeed(
        command(models_of(tiny, {}), run_dir, "--config", str(config), *residency, *eval_flags)
    )
    rows = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    wakes = [row["event"] for row in rows if str(row.get("event", "")).startswith("wake")]
    assert wakes == ["wake base"] * 2, rows[:3]  # once in each of two steps
    said = {name for entry in ledger_of(run_dir) for name in entry["teachers"]}
    assert said == {"base", "first", "second"}
    assert losses_of(run_dir) and metrics_of(run_dir)[-1]["step"] == 2
    card = (run_dir / "model" / "README.md").read_text()
    assert str(adapters["first"]) in card and "model:" in out


def test_a_run_that_follows_its_past_resumes_to_the_bit(tiny, tmp_path):
    """Beside a teacher of its own: from itself alone it learns nothing."""
    before = content_hash(str(tiny.student))
    named = {"real": str(tiny.addition), "last": "self@-1", "mean": "self@ema:.5", "0": "self@0"}
    entries = [{"name": n, "model": m, "domains": "*", "weight": 1} for n, m in named.items()]
    config = tmp_path / "teachers.yaml"
    config.write_text(json.dumps({"teachers": entries}))
    models = models_of(tiny, {})
    given = ("--config", str(config), "--save_every", "2", "--lr_schedule", "constant")
    whole, half = tmp_path / "whole", tmp_path / "half"
    succeed(command(models, whole, *given, "--num_steps", "4"))
    succeed(command(models, half, *given, "--num_steps", "2"))
    longer = ("--num_steps", "4", "--allow_change", "num_steps")
    succeed(command(models, half, *given, *longer))
    assert parameter_hash(whole) == parameter_hash(half)
    assert losses_of(whole) == losses_of(half) and losses_of(whole)[1] > 0
    assert content_hash(str(tiny.student)) == before  # its files are mapped, never written
    files = sorted((half / "checkpoints" / "step_2").glob("past_*.safetensors"))
    assert len(files) == 2
    manifest = json.loads((half / "checkpoints" / "step_2" / "manifest.json").read_text())
    assert {file.name for file in files} <= {entry["file"] for entry in manifest["files"]}
    assert all(len(load_file(file)) > 10 for file in files)
