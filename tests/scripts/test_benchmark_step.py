"""The benchmarks of whole steps and of quality: small runs from end to end, and the arithmetic
between runs and tables.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

from scripts import bench_recovery, bench_step
from scripts.measure import runs
from scripts.measure.real_workload import UNUSED, write_smollm2
from scripts.measure.tools import read_jsonl
from tests.support.processes import worker_environment

# ---- A step --------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_without_trl_our_step_is_measured_and_no_ratio_is_made_up(run_main, tmp_path):
    result, console = run_main(
        bench_step,
        f"--steps 6 --rounds 1 --workloads tiny --modes 1rank --trl_dir {tmp_path} --enforce_eager",
    )
    assert f"pip install --no-deps --target {tmp_path} trl==1.16.0" in console
    ratios = [result[key] for key in ("speedup_1rank", "speedup_zero3_2ranks", "trl")]
    assert ratios == [None] * 3
    mode = result["workloads"]["tiny"]["1rank"]
    ours, phases_ms = mode["ours"], mode["ours"]["phases_ms"]
    assert mode["speedup"] is None and mode["threads_per_rank"] == 2
    assert set(phases_ms) == {"rollout", "score", "train", "sync"} and min(phases_ms.values()) > 0
    assert sum(phases_ms.values()) <= 1.2 * ours["step_ms"]
    assert ours["response_tokens"] == 64 and ours["first_loss"] > 1e-3


def test_prompts_have_the_asked_length_and_no_model_can_end_its_response(tmp_path):
    workload = runs.Workload(2, 12, 4, student=(1, 64), teacher=(2, 96))
    runs.write_workload(tmp_path, workload, steps=3, vocab_size=300)
    tokenizer = runs.byte_tokenizer(300)
    rows = read_jsonl(tmp_path / "prompts.jsonl")
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    assert (
        len(rows) == 6
        and {len(ids) for ids in prompts} == {12}
        and len(set(map(tuple, prompts))) == 6
    )
    for name, (layers, hidden_size) in (
        ("student", workload.student),
        ("teacher", workload.teacher),
    ):
        model = Qwen3ForCausalLM.from_pretrained(tmp_path / name)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, hidden_size)
        with torch.no_grad():
            logits_BSV = model(torch.tensor(prompts)).logits
        probs_BSV = logits_BSV.softmax(-1)
        silent = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert probs_BSV[..., silent].max() < 1e-20 and probs_BSV.shape[-1] == 300
        assert probs_BSV.max() < 0.1, "the other tokens are meant to stay near uniform"


def test_the_real_model_reads_real_questions_and_cannot_end(smollm2, tmp_path):
    workload = bench_step.WORKLOADS["smollm2"]
    write_smollm2(tmp_path / "real", workload, steps=2)
    rows = read_jsonl(tmp_path / "real" / "prompts.jsonl")
    assert len(rows) == 2 * workload.prompts and {r["data_source"] for r in rows} == {"teacher"}
    for name, (layers, _) in (("student", workload.student), ("teacher", workload.teacher)):
        path = tmp_path / "real" / name
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert config.num_hidden_layers == layers
        assert config.eos_token_id == tokenizer.eos_token_id == UNUSED["id"]
        for row in rows:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
            assert UNUSED["id"] not in ids and len(ids) <= workload.prompt_tokens


def test_flags_are_written_as_a_user_types_them():
    found = runs.flags(num_steps=0, data=["a", "b"], plan=True, dry_run=False, teacher=None)
    assert found == ["--num_steps", "0", "--data", "a", "b", "--plan"]


def test_domains_of_prompts_take_turns(tmp_path):
    runs.write_prompts(tmp_path / "prompts.jsonl", 5, 4, ("math", "code"))
    rows = read_jsonl(tmp_path / "prompts.jsonl")
    assert [row["data_source"] for row in rows] == ["math", "code", "math", "code", "math"]
    assert {len(row["prompt"][0]["content"]) for row in rows} == {3}


def a_run(step_s: list[float], length: float = 64.0) -> dict:
    seconds = {"step": step_s, "rollout": [0.5 * s for s in step_s]}
    return {
        "seconds": seconds,
        "response_tokens": [length] * len(step_s),
        "losses": [0.25] * len(step_s),
        "peak_mib": 1024,
    }


def test_medians_are_over_the_kept_steps_of_all_runs():
    warm = [9.0] * bench_step.WARMUP_STEPS
    result = bench_step.summary([a_run([*warm, 0.1, 0.2, 0.3]), a_run([*warm, 0.4, 0.5, 0.6])], 64)
    assert result["step_ms"] == 350 and result["phases_ms"] == {"rollout": 175}
    assert result["step_ms_of_each_run"] == [200, 500] and result["first_loss"] == 0.25
    with pytest.raises(runs.RunFailed, match=r"63\.50 to 64\.00 tokens, 64 asked"):
        bench_step.summary([a_run([*warm, 0.1]), a_run([*warm, 0.1], length=63.5)], 64)


def test_the_ratio_is_against_the_fastest_side_that_ran(tmp_path, monkeypatch):
    """Sides take turns; one that fails is null with its reason, and is not started again."""
    calls = []

    def side(name: str, seconds: float | None):
        def run(case, work: Path) -> dict:
            assert work.is_dir()
            calls.append(name)
            if seconds is None:
                raise runs.RunFailed("no such engine")
            return a_run([seconds] * 6)

        return run

    sides = {
        "ours": side("ours", 0.1),
        "trl_hf": side("trl_hf", 0.3),
        "trl_vllm": side("trl_vllm", None),
    }
    monkeypatch.setattr(bench_step, "SIDES", sides)
    workload, mode = bench_step.WORKLOADS["tiny"], bench_step.MODES["1rank"]
    case = bench_step.Case(tmp_path, workload, mode, steps=6, threads=1, trl_dir=tmp_path)
    result = bench_step.compare(case, list(sides), 2, tmp_path / "work")
    assert calls == ["ours", "trl_hf", "trl_vllm", "ours", "trl_hf"]
    assert result["speedup"] == 3.0 and result["against"] == "trl_hf"
    assert result["trl_vllm"] is None and result["reasons"] == {"trl_vllm": "no such engine"}
    assert "3.00x against trl_hf" in bench_step.table("tiny", "1rank", result)
    sides["trl_vllm"] = side("trl_vllm", 0.05)
    assert bench_step.compare(case, list(sides), 1, tmp_path / "more")["speedup"] == 0.5


def test_a_child_that_fails_says_why(tmp_path):
    code = (
        "import sys; print('ValueError: the cause'); print('the launcher says goodbye'); "
        "sys.exit(3)"
    )
    with pytest.raises(runs.RunFailed, match="exit status 3: ValueError: the cause"):
        runs.run_child([sys.executable, "-c", code], tmp_path / "log.txt", worker_environment())
    with pytest.raises(runs.RunFailed, match="no end after 1 s"):
        wait = [sys.executable, "-c", "import signal; signal.pause()"]
        runs.run_child(wait, tmp_path / "log.txt", worker_environment(), deadline_s=1)


# ---- Quality per sample --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature_demo(tiny, tokenizer, tmp_path_factory) -> Path:
    """Laid out as the demo, with one domain; the answers are what the teacher writes, so that there
    is a gap to close.
    """
    root = tmp_path_factory.mktemp("miniature_demo")
    (root / "student").symlink_to(tiny.student)
    (root / "teacher_reversal").symlink_to(tiny.reversal)
    teacher = Qwen3ForCausalLM.from_pretrained(tiny.reversal)
    for source in (tiny.train, tiny.eval):
        rows = [row for row in read_jsonl(source) if row["data_source"] == "reversal"]
        for row in rows:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            written = teacher.generate(**ids, do_sample=False, max_new_tokens=12)[
                0, ids["input_ids"].shape[1] :
            ]
            row["answer"] = tokenizer.decode(written, skip_special_tokens=True)
        (root / source.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.e2e
def test_two_forms_give_a_table_a_plot_and_their_curves(run_main, miniature_demo, tmp_path):
    output, plot = tmp_path / "runs", tmp_path / "plots" / "recovery.png"
    for directory in (output / "full", output / "sampled", output / "not_ours"):
        directory.mkdir(parents=True)
        (directory / "kept.txt").write_text("")
    result, console = run_main(
        bench_recovery,
        f"--demo {miniature_demo} --output_dir {output} --plot {plot} --forms full sampled --steps "
        "2 --prompts_per_step 8 --jobs 2",
    )
    assert result["seeds"] == [0] and result["reasons"] == {}
    assert list(result["forms"]) == ["full", "sampled"]
    for form, measured in result["forms"].items():
        assert measured["samples"] == [0, 8, 16]
        assert measured["entropy"] > 0 and measured["step_ms"] > 0
        curve, end = measured["curves"]["reversal"], measured["recovery"]["reversal"]
        low, high = measured["ci95"]["reversal"]
        assert curve[0] == 0 and len(curve) == 3 and curve[-1] == end and low <= end <= high
        assert set(measured["curves"]) == set(measured["samples_to_90"]) == {"reversal"}
        assert not (output / form / "kept.txt").exists()
        assert f"removing {output / form}," in console
    assert (output / "not_ours" / "kept.txt").exists()
    full, sampled = (result["forms"][form]["entropy"] for form in ("full", "sampled"))
    assert full != sampled, "the forms train alike"
    if importlib.util.find_spec("matplotlib"):
        assert result["plot"] == str(plot) and plot.read_bytes().startswith(b"\x89PNG")
    else:
        assert result["plot"] is None and "pip install matplotlib" in console


def test_where_a_curve_reaches_its_target():
    samples = [0, 100, 200]
    assert bench_recovery.samples_to(0.9, samples, [0.0, 0.8, 1.0]) == 150
    assert bench_recovery.samples_to(0.9, samples, [0.0, 0.95, 0.2]) == 95
    assert bench_recovery.samples_to(0.9, samples, [0.95, 0.0, 0.0]) == 0
    assert bench_recovery.samples_to(0.9, samples, [0.0, 0.8, 0.85]) is None
    assert bench_recovery.samples_to(0.9, samples, [None, None, None]) is None


def test_seeds_are_averaged_and_a_domain_without_a_gap_stays_empty():
    def run(end: float, high: float) -> dict:
        known = {"recovery": end, "ci95": [0.1, high], "teacher": 1.0}
        return {
            "samples": [0, 10],
            "curves": {"known": [0.0, end], "closed": [None, None]},
            "report": {"known": known, "closed": {"recovery": None, "ci95": None, "teacher": 0.5}},
            "entropy": end,
            "step_ms": 100 * end,
        }

    result = bench_recovery.summary([run(0.8, 0.9), run(1.0, 1.1)])
    assert result["recovery"] == {"known": 0.9, "closed": None} and result["curves"]["known"] == [
        0.0,
        0.9,
    ]
    assert (
        result["ci95"] == {"known": [0.1, 1.0], "closed": [None, None]} and result["entropy"] == 0.9
    )
    assert result["samples_to_90"] == {"known": 10, "closed": None} and result["step_ms"] == 90
    assert result["recovery_of_each_seed"]["known"] == [0.8, 1.0]
    row = bench_recovery.table_row("full", result)
    assert (
        row["known 95 %"] == "0.100 to 1.000"
        and row["closed"] is None
        and row["samples to 0.9"] is None
    )
    assert (
        bench_recovery.recovery(0.5, 0.75, 1.0) == 0.5
        and bench_recovery.recovery(0.5, 0.75, 0.5) is None
    )
