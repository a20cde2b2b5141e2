"""A user with a student of 4B, teachers of 32B and 30B-A3B and responses of 16k, from the first
command to the first weight: each step answers in words.
"""

import json

import pytest

import train_mopd
from opd.inputs.arguments import parse
from opd.plan.__main__ import plan_command
from opd.run.prepare import prepare
from scripts.make_demo import write_jsonl
from scripts.measure.runs import byte_tokenizer
from tests.support.processes import ROOT
from tests.support.published import PUBLISHED, write_hollow


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer(PUBLISHED["Qwen3-4B"]["vocab_size"])
    paths = {}
    for name in ("Qwen3-4B", "Qwen3-32B", "Qwen3-Coder-30B-A3B"):
        paths[name] = write_hollow(name, root)
        tokenizer.save_pretrained(paths[name])
        config = json.loads((root / name / "config.json").read_text())
        config["eos_token_id"] = tokenizer.eos_token_id
        (root / name / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": "What is 2 + 2?", "data_source": name} for name in ("math", "code")] * 4
    write_jsonl(root / "train.jsonl", rows)
    return [
        *("--student_model", paths["Qwen3-4B"], "--teacher", f"math={paths['Qwen3-32B']}"),
        *("--teacher", f"code={paths['Qwen3-Coder-30B-A3B']}", "--output_dir", str(root / "run")),
        *("--data", str(root / "train.jsonl"), "--ds_config", str(ROOT / "ds_configs/zero3.json")),
        *("--max_response_tokens", "16384"),
    ]


def test_the_plan_says_what_the_run_needs(flags, capsys):
    machine = ["--gpus", "8", "--gpu_memory", "80", "--host_memory", "1500"]
    assert plan_command([*flags, *machine]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "plan: --gradient_checkpointing" in said and said[-1].startswith("fits: ")
    assert plan_command([*flags, *machine[:-1], "100"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: ")
    assert plan_command([*flags, *machine, "--teacher_kv_cache_gib", "0.25"]) == 2
    line = "one sequence of 17408 tokens takes 4.254 GiB of --teacher math "
    assert line in capsys.readouterr().err


@pytest.mark.usefixtures("device")
def test_a_dry_run_checks_models_and_data_and_ends(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare(parse(train_mopd.Config, [*flags, "--dry_run"]))
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "plan: does not fit: " in said, "on this machine"
    assert "teacher math" in said and "teacher code" in said and "What is 2 + 2?" in said


@pytest.mark.usefixtures("device")
def test_what_does_not_fit_this_machine_is_a_line(flags):
    with pytest.raises(ValueError, match=r"^the run does not fit: .* with --ignore_plan$"):
        prepare(parse(train_mopd.Config, flags))
