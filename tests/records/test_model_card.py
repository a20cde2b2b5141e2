"""The card of a trained model: what the hub reads of it, what people read, and what it hides."""

import re

import pytest
import yaml

from opd.inputs.arguments import parse
from opd.options import to_dict
from opd.records.model_card import model_card
from train_mopd import Config


def config_of(tmp_path, *flags: str, student="Qwen/Qwen3-4B", data="org/prompts", teachers=None):
    path = tmp_path / "run.yaml"
    teachers = teachers or [
        {"name": "math", "model": "org/big@v2", "domains": ["math", "algebra"], "weight": 2},
        {"name": "rest", "model": str(tmp_path), "domains": "*"},
    ]
    path.write_text(yaml.safe_dump({"teachers": teachers, "data": [data]}))
    argv = ["--config", str(path), "--student_model", student, "--output_dir", "runs/a"]
    return parse(Config, [*argv, *flags])


def header_of(card: str) -> dict:
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def rows_of(card: str) -> list[list[str]]:
    rows = [line.strip("| ") for line in card.splitlines() if line.startswith("| ")]
    return [re.split(r" +\| +", row) for row in rows]


def test_the_header_is_what_the_hub_reads(tmp_path):
    card = model_card(config_of(tmp_path, student="Qwen/Qwen3-4B@main"), "train_mopd.py", None)
    assert header_of(card) == {
        "base_model": "Qwen/Qwen3-4B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "distillation"],
        "datasets": ["org/prompts"],
    }
    card = model_card(config_of(tmp_path), "train_mopd.py", None, sees=True)
    assert header_of(card)["pipeline_tag"] == "image-text-to-text"


@pytest.mark.parametrize(("flag", "library"), [("", "peft"), ("--merge_on_export", "transformers")])
def test_an_adapter_says_that_it_is_one(flag, library, tmp_path):
    flags = f"--lora_r 16 --lora_targets q_proj,v_proj {flag}".split()
    card = model_card(config_of(tmp_path, *flags), "train_mopd.py", None)
    assert header_of(card)["library_name"] == library and "lora" in header_of(card)["tags"]
    (said,) = (row[1] for row in rows_of(card) if row[0] == "adapter")
    assert said.startswith("LoRA of rank 16, alpha 32, on q_proj,v_proj")
    assert ("merged" in said) == bool(flag)


@pytest.mark.parametrize("data", ["demo/train.jsonl", "/srv/prompts", "./prompts"])
def test_paths_stand_in_the_text_only(data, tmp_path):
    cfg = config_of(tmp_path, student=str(tmp_path), data=data)
    card = model_card(cfg, "train_mopd.py", None)
    assert not {"base_model", "datasets"} & header_of(card).keys()
    assert ["student", str(tmp_path)] in rows_of(card) and ["data", data] in rows_of(card)


def test_it_names_models_domains_loss_and_steps(tmp_path):
    flags = "--loss jsd --support union_topk --reward_weight 0.5 --num_steps 7"
    card = model_card(config_of(tmp_path, *flags.split()), "train_mopd.py", None)
    assert card.count("# Qwen3-4B, distilled on-policy\n") == 1 and "## Recovery" not in card
    rows = rows_of(card)
    assert ["teacher math", "org/big@v2", "math, algebra, weight 2"] in rows
    assert ["teacher rest", str(tmp_path), "every other"] in rows
    loss = "jsd on the support union_topk, and the task reward exact_match x 0.5"
    assert ["loss", loss] in rows
    assert ["steps", "7, of 64 prompts x 1 responses each"] in rows


def test_it_shows_the_recovery(tmp_path):
    entry = {
        "student_before": 0.25, "student_after": 0.5, "teacher": 0.75, "recovery": 0.5,
        "ci95": [0.1, 0.9], "n": 4,
    }  # fmt: skip
    unknown = entry | {"teacher": None, "recovery": None, "ci95": None}
    report = {"domains": {"math": entry, "a|b": unknown}, "steps": 7, "wall_s": 1.0}
    card = model_card(config_of(tmp_path), "train_mopd.py", report)
    row = ["math", "4", "0.250", "0.500", "0.750", "50.0%", "10.0% to 90.0%"]
    assert row in rows_of(card)
    assert "| a\\|b | 4 | 0.250 | 0.500 | - | - | - |" in card


def test_its_command_starts_the_same_run(tmp_path):
    flags = "--loss jsd --num_steps 7 --reward_fn exact_match math=last_number --seed 3"
    cfg = config_of(tmp_path, *flags.split())
    card = model_card(cfg, "train_mopd.py", None)
    assert "python train_mopd.py --config run.yaml\n" in card
    text = re.search(r"```yaml\n(.*?)```", card, re.S)[1]
    assert "temperature" not in text  # a default
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert to_dict(parse(Config, ["--config", str(again)])) == to_dict(cfg)


def test_it_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-of-the-environment")
    url = "http://me:canary-of-a-url@10.0.0.1:8000"
    teacher = {"name": "math", "backend": "server", "urls": [url], "api_key_env": "MY_TOKEN"}
    cfg = config_of(tmp_path, data="canary-of-the-environment", teachers=[teacher])
    card = model_card(cfg, "train_mopd.py", None)
    assert "canary" not in card
    assert "http://***@10.0.0.1:8000" in card and ["teacher math", "served", "math"] in rows_of(
        card
    )
