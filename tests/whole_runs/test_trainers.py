"""The trainers as a user starts them: subprocesses, launchers, kills, resumes, the export, and what
bad input gets.

Runs that do not depend on each other share the two cores two at a time; each starts real vLLM and
DeepSpeed engines.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.launch import (
    DEADLINE,
    at_most_two,
    command,
    losses_of,
    metrics_of,
    parameter_hash,
    start,
    succeed,
)
from tests.support.metrics_page import documented_keys, undocumented
from tests.support.processes import ROOT

pytestmark = pytest.mark.e2e


# ---- Same numbers whatever starts them -----------------------------------------------------------

MOPD_STARTS = [("python", 1), ("deepspeed", 2)]
GKD_STARTS = [("python", 1), ("accelerate", 2)]
OTHER_STARTS = [*(("python", 1), ("deepspeed", 1), ("accelerate", 1)), ("torchrun", 2)]
GKD_FLAGS = ("--loss", "jsd", "--lmbda", "0.5", "--sft_alpha", "0.1", "--num_steps", "3")


@pytest.mark.parametrize(
    ("script", "starts", "flags"),
    [
        ("train_mopd.py", MOPD_STARTS, ()),
        ("train_gkd.py", GKD_STARTS, GKD_FLAGS),
        pytest.param(
            "train_mopd.py", [*OTHER_STARTS, ("accelerate", 2)], (), marks=pytest.mark.long
        ),
        pytest.param(
            "train_gkd.py", [*OTHER_STARTS, ("deepspeed", 2)], GKD_FLAGS, marks=pytest.mark.long
        ),
    ],
)
def test_launchers_and_ranks_give_the_same_losses(models, tmp_path, script, starts, flags):
    dirs = {s: tmp_path / f"{s[0]}_{s[1]}" for s in starts}
    at_most_two(
        [
            lambda s=s, d=d: succeed(
                command(models, d, *flags, script=script, launcher=s[0], ranks=s[1])
            )
            for s, d in dirs.items()
        ]
    )
    reference = losses_of(dirs[starts[0]])
    assert len(reference) == (3 if flags else 2) and all(loss > 1e-3 for loss in reference)
    for started, run_dir in dirs.items():
        assert losses_of(run_dir) == pytest.approx(reference, abs=1e-5), started
    if script == "train_gkd.py":
        shares = [row["distill/on_policy_share"] for row in metrics_of(dirs[starts[0]])]
        assert set(shares) == {0.0, 1.0}, (
            "seed 0 is meant to show both faces of the coin in three steps"
        )


# ---- A whole run, its directory and its export ---------------------------------------------------


@pytest.fixture(scope="module")
def full_run(models, tmp_path_factory):
    """Four steps with everything on, and its console output."""
    run_dir = tmp_path_factory.mktemp("full") / "run"
    flags = (
        "--num_steps",
        "4",
        "--save_every",
        "2",
        "--eval_every",
        "2",
        "--eval_data",
        str(models.eval),
    )
    return run_dir, succeed(command(models, run_dir, *flags)), flags


def test_the_run_directory_is_complete(full_run):
    run_dir, console, _ = full_run
    expected = (
        "config.yaml command.txt env.txt metrics.jsonl tb rollouts "
        "checkpoints/step_4/manifest.json model report.json"
    )
    for name in [*expected.split(), "ledger.jsonl", "logs/rank_0.log"]:
        assert (run_dir / name).exists(), name
    steps = [row["step"] for row in metrics_of(run_dir)]
    assert steps == [0, 1, 2, 3, 4]
    lines = [line for line in console.splitlines() if re.match(r"step \d+/4", line)]
    assert len(lines) == 5, console
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["domains"]) == {"addition", "reversal"} and report["steps"] == 4
    assert all(
        set(d) >= {"student_before", "student_after", "teacher", "recovery", "ci95", "n"}
        for d in report["domains"].values()
    )
    card = (run_dir / "model" / "README.md").read_text()
    assert "library_name: transformers" in card and "| steps | 4, of" in card
    assert "| addition |" in card and "python train_mopd.py --config run.yaml" in card


def test_every_emitted_metric_is_documented(full_run):
    run_dir, _, _ = full_run
    emitted = {key for row in metrics_of(run_dir) for key in row} - {"step"}
    assert not undocumented(emitted, documented_keys(ROOT / "docs" / "metrics.md"))
    always = {
        "loss/total/addition",
        "distill/k1/reversal",
        "mismatch/abs_max",
        "eval/accuracy/addition",
        "mem/host_rss_gib",
    }
    assert always <= emitted
    parity = max(
        row["mismatch/abs_max"] for row in metrics_of(run_dir) if "mismatch/abs_max" in row
    )
    assert parity < 1e-4, "the sampler's weights are not the student's"


VLLM_SAMPLES = """
import json, sys
from opd import distributed
from opd.engines.vllm_process import import_vllm
with distributed.exit_together():
    distributed.init()
    vllm = import_vllm()
    llm = vllm.LLM(sys.argv[1], dtype="float32", max_model_len=64, kv_cache_memory_bytes=1 << 26, enforce_eager=True,
                   distributed_executor_backend="external_launcher")
    params = vllm.SamplingParams(max_tokens=48, temperature=1.0, n=32, seed=0)
    (output,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], params, use_tqdm=False)
    print("IDS", json.dumps([list(o.token_ids) for o in output.outputs]))
"""  # noqa: E501


def test_the_export_loads_and_stops_on_eos(full_run):
    """Neither is told which token ends a response: both must learn it from the export.

    Nearly random weights soon say it.
    """
    run_dir, _, _ = full_run
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    eos = tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt] * 32)
    torch.manual_seed(0)
    sampled = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=True, top_k=0
    )
    by_transformers = [row[len(prompt) :] for row in sampled.tolist()]
    environment = {"PYTHONPATH": str(ROOT)}
    console = succeed(
        [sys.executable, "-c", VLLM_SAMPLES, str(run_dir / "model"), json.dumps(prompt)],
        **environment,
    )
    by_vllm = json.loads(
        next(line for line in console.splitlines() if line.startswith("IDS")).removeprefix("IDS")
    )
    ended = [row[row.index(eos) + 1 :] for row in by_transformers if eos in row]
    assert ended and all(set(rest) <= {tokenizer.pad_token_id} for rest in ended)
    ended = [row for row in by_vllm if eos in row]
    assert ended and all(row.index(eos) == len(row) - 1 for row in ended)


def test_a_finished_run_resumes_to_nothing(models, full_run):
    run_dir, _, flags = full_run
    before, hashed = metrics_of(run_dir), parameter_hash(run_dir)
    console = succeed(command(models, run_dir, *flags))
    assert (
        "resumes from" in console
        and metrics_of(run_dir) == before
        and parameter_hash(run_dir) == hashed
    )


@pytest.mark.long
def test_killed_in_a_save_and_resumed_equals_undisturbed(models, tmp_path, full_run):
    undisturbed, _, flags = full_run
    run_dir = tmp_path / "run"
    killed = start(command(models, run_dir, *flags), OPD_FAULT="save.before_retention:kill")
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in (run_dir / "checkpoints").glob("step_*")] == ["step_2"]
    console = succeed(command(models, run_dir, *flags))
    assert f"resumes from {run_dir}/checkpoints/step_2" in console
    assert parameter_hash(run_dir) == parameter_hash(undisturbed)
    assert losses_of(run_dir) == losses_of(undisturbed)
    assert [row["step"] for row in metrics_of(run_dir)] == [0, 1, 2, 3, 4]


def test_other_losses_and_teacher_written_responses(models, tmp_path, full_run):
    """Two steps each: policy gradient with rewards and weights, then with an old policy of its own,
    a mixture in bfloat16 under ZeRO-2, top-k, a union of top-k with all that saves memory and
    rollouts, seq_kd.
    """
    mixture = tmp_path / "mixture.yaml"
    both = [
        {
            "name": f"{n}_{d}",
            "model": str(models.teachers[d]),
            "domains": ["addition", "reversal"],
            "weight": w,
        }
        for n, d, w in (("first", "addition", 3), ("second", "reversal", 1))
    ]
    mixture.write_text(json.dumps({"teachers": both}))
    forms = {
        "pg": (
            "--loss",
            "reverse_kl_pg",
            "--advantage_clip",
            "2",
            "--is_mode",
            "truncate",
            "--is_level",
            "sequence",
            "--num_generations",
            "2",
            "--reward_weight",
            "0.5",
            "--clip_low",
            "0.2",
            "--dual_clip",
            "3",
        ),
        "decoupled": (
            "--loss",
            "reverse_kl_pg",
            "--old_logprobs",
            "recompute",
            "--clip_low",
            "0.2",
            "--inner_updates",
            "2",
            "--is_mode",
            "truncate",
            "--reject_level",
            "geometric",
            "--reject_high",
            "1.0001",
            "--parity_every",
            "0",
        ),
        "mixed": (
            "--dtype",
            "bfloat16",
            "--gradient_checkpointing",
            "--ds_config",
            "ds_configs/zero2.json",
            "--config",
            str(mixture),
        ),
        "topk": (
            "--num_generations",
            "2",
            "--reward_weight",
            "0.2",
            "--loss",
            "skew_forward_kl",
            "--support",
            "teacher_topk",
            "--support_k",
            "4",
            "--domain_weights",
            "addition=3",
            "reversal=1",
        ),
        "union": (
            "--support",
            "union_topk",
            "--support_k",
            "4",
            "--inner_updates",
            "2",
            "--packing",
            "--max_tokens_per_micro_batch",
            "64",
            "--teacher_cache_bytes",
            "4000",
        ),
    }
    commands = {name: command(models, tmp_path / name, *flags) for name, flags in forms.items()}
    commands["mixed"] = [a for a in commands["mixed"] if not a.startswith("--teacher=")]
    jobs = [lambda a=a: succeed(a) for a in commands.values()]
    jobs.append(
        lambda: succeed(
            command(
                models,
                tmp_path / "seq_kd",
                "--seq_kd",
                "--lmbda",
                "0",
                "--sft_alpha",
                "0.1",
                script="train_gkd.py",
            )
        )
    )
    at_most_two(jobs)
    documented = documented_keys(ROOT / "docs" / "metrics.md")
    for name in (*forms, "seq_kd"):
        rows = metrics_of(tmp_path / name)
        assert len(rows) == 2 and not undocumented(
            {k for row in rows for k in row} - {"step"}, documented
        ), name
    runs = [full_run[0], *(tmp_path / name for name in (*forms, "seq_kd"))]
    emitted = {key for run_dir in runs for row in metrics_of(run_dir) for key in row}
    never = {key for key, pattern in documented.items() if not any(map(pattern.fullmatch, emitted))}
    # a GPU, served teachers, the asynchronous mode, teachers with other added tokens
    elsewhere = (
        "mem/gpu",
        "teacher/",
        "logprob/",
        "rollout/waited_s",
        "rollout/ready",
        "rollout/in_flight",
        "rollout/sampled",
        "rollout/tokens_per_second",
        "rollout/idle",
        "rollout/server_retries",
        "rollout/push_",
        "rollout/unshared_tokens",
        "perf/trainer_idle",
        "perf/push_share",
        "mismatch/old_policy_gap",
        "staleness/token_share",
        "staleness/old_policy_lag",
    )
    assert all(key.startswith(elsewhere) for key in never), f"documented, but no run emits {never}"
    pg, topk = metrics_of(tmp_path / "pg"), metrics_of(tmp_path / "topk")
    assert {"distill/clip_fraction", "rollout/reward", "mismatch/weight_mean"} <= pg[0].keys()
    assert "mismatch/pearson" in pg[0] and "mismatch/rejected" not in pg[0]
    decoupled = metrics_of(tmp_path / "decoupled")
    assert decoupled[0]["distill/ratio_clip_fraction"] > 0, (
        "the second update leaves the old policy"
    )
    for row in decoupled:  # every step, without parity checks: sampler and trainer are in sync
        assert (
            row["mismatch/k3"] < 1e-6
            and row["mismatch/rejected"] == 0
            and row["mismatch/weight_mean"] > 0.999
        )
        assert row["mismatch/pearson"] > 0.999 and row["mismatch/ess"] > 0.999
    assert 0 < topk[0]["distill/teacher_mass"] < 1
    union = metrics_of(tmp_path / "union")
    assert 0 < union[0]["distill/spilled"] < 1 and union[0]["distill/teacher_mass"] < 1
    assert (
        "--teacher_cache_bytes 4000 holds"
        in (tmp_path / "union" / "logs" / "rank_0.log").read_text()
    )
    written = json.loads((tmp_path / "seq_kd" / "seq_kd.json").read_text())["responses"]
    assert len(written) == len(Path(models.train[0]).read_text().splitlines())
    assert metrics_of(tmp_path / "seq_kd")[0]["distill/on_policy_share"] == 0


def test_every_sharding_goes_the_full_cycle_with_teachers_that_come_and_go(models, tmp_path):
    """ZeRO 1, 2, 3 and 3 with the optimizer on the CPU: one result.

    The hf teachers leave for real, each in its turn.
    """
    configs = ("zero1", "zero2", "zero3", "zero3_offload")
    away = (
        "--teacher_backend",
        "hf",
        "--teacher_residency",
        "disk",
        "--plan",
        "auto",
        "--num_steps",
        "3",
    )
    jobs = [
        lambda name=name: succeed(
            command(models, tmp_path / name, *away, "--ds_config", f"ds_configs/{name}.json")
        )
        for name in configs
    ]
    outputs = at_most_two(jobs)
    losses = {name: losses_of(tmp_path / name) for name in configs}
    for name in configs:
        assert len(losses[name]) == 3 and losses[name] == pytest.approx(
            losses["zero3"], abs=1e-5
        ), name
    for name, output in zip(configs, outputs, strict=True):
        ledger = [
            json.loads(line) for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()
        ]
        turns = [line for line in ledger if line["event"].startswith("wake ")]
        assert len(turns) == 2 * 3 and all(
            line["event"] == f"wake {line['awake'][-1]}" for line in turns
        )
        awake = [set(line.get("awake", [])) & set(models.teachers) for line in ledger]
        assert max(map(len, awake)) == 1, "one at a time"
        assert not any(awake[i] for i, line in enumerate(ledger) if line["event"] == "exit")
        phases = ledger[-1]["phases"]
        assert ledger[-1]["event"] == "predicted and measured" and set(phases) == {
            "rollout",
            "score",
            "train",
            "sync",
        }
        assert all(phase["measured"] > 0 and phase["predicted"] > 0 for phase in phases.values())
        assert "memory, predicted/measured: " in output
        assert "plan: --max_tokens_per_micro_batch" not in output, "--micro_batch_size is given"
        assert {f"mem/{phase}_gib" for phase in phases} <= metrics_of(tmp_path / name)[0].keys()


# ---- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["rollout", pytest.param("backward", marks=pytest.mark.long)])
def test_an_error_on_one_rank_ends_all(models, tmp_path, point):
    """`rollout` is agreed on by all ranks; `backward` strikes inside a collective region."""
    failed = start(
        command(models, tmp_path / "run", launcher="torchrun", ranks=2),
        OPD_FAULT=f"{point}:raise",
        OPD_FAULT_RANK="1",
    )
    ended = time.time()
    assert failed.returncode != 0
    assert f"fault injected at {point}" in failed.stderr
    if point == "rollout":
        assert "rollout failed on rank 1: RuntimeError: fault injected at rollout" in failed.stderr
    ledger = [
        json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert ended - (tmp_path / "run" / "ledger.jsonl").stat().st_mtime < 30, ledger[-1]


def test_a_rank_that_fails_to_build_an_engine_leaves_nobody_waiting(models, tmp_path):
    """vLLM reduces over all ranks when the second engine is built: the other is inside by then."""
    failed = start(
        command(models, tmp_path / "run", launcher="torchrun", ranks=2),
        OPD_FAULT="build.engine:raise@2",
        OPD_FAULT_RANK="1",
    )
    ended = time.time()
    assert failed.returncode != 0
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: rank 1 failed: RuntimeError: fault injected at build.engine"
    log = tmp_path / "run" / "logs" / "rank_1.log"
    assert "fault injected at build.engine" in log.read_text()
    assert ended - log.stat().st_mtime < 60


def test_nothing_is_left_after_a_sigkill_of_the_launcher(models, tmp_path):
    arguments = command(
        models, tmp_path / "run", "--num_steps", "100000", launcher="deepspeed", ranks=2
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPD_TEST_MARK": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        launcher = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (
                tmp_path / "out"
            ).read_text()[-3000:]
            time.sleep(0.2)
        assert len(marked_processes(tmp_path)) >= 3
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 10
        while marked_processes(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not marked_processes(tmp_path)
    finally:
        for pid in marked_processes(tmp_path):
            os.kill(pid, signal.SIGKILL)


def marked_processes(mark: Path) -> list[int]:
    """Processes that inherited our environment variable: the launcher, the ranks, and whatever they
    started.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if (
                f"OPD_TEST_MARK={mark}".encode() in path.read_bytes()
                and int(path.parent.name) != os.getpid()
            ):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_bad_input_is_one_line_and_status_2(models, tmp_path):
    """In a subprocess and once on two ranks; tests/inputs has the whole list, in process."""
    typo = start(command(models, tmp_path / "a", "--learnin_rate", "1"))
    assert typo.returncode == 2 and typo.stderr.strip().endswith("did you mean --learning_rate?"), (
        typo.stderr
    )
    assert typo.stderr.strip().count("\n") == 0 and "Traceback" not in typo.stderr
    arguments = command(models, tmp_path / "b", launcher="torchrun", ranks=2)
    arguments = [a for a in arguments if not a.startswith("--teacher=reversal")]
    orphan = start(arguments)
    assert orphan.returncode != 0
    mistakes = [line for line in orphan.stderr.splitlines() if line.startswith("error:")]
    assert len(mistakes) == 1 and "reversal (" in mistakes[0], orphan.stderr[-2000:]
    assert "exitcode  : 2" in orphan.stderr and "SIGABRT" not in orphan.stderr, orphan.stderr[
        -2000:
    ]


@pytest.mark.parametrize(
    ("who", "name"), [("student", "model.norm.weight"), ("addition", "lm_head.weight")]
)
def test_a_weight_that_is_no_number_is_found_at_the_start(models, tmp_path, who, name):
    path = models.student if who == "student" else models.teachers[who]
    broken = shutil.copytree(path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with_it = replace(
        models,
        **(
            {"student": broken}
            if who == "student"
            else {"teachers": {**models.teachers, who: broken}}
        ),
    )
    done = start(command(with_it, tmp_path / "run"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert len(errors) == 1 and "look for NaN and infinity" in errors[0], errors


def test_dry_run_loads_nothing(models, tmp_path):
    console = succeed(command(models, tmp_path / "run", "--dry_run"))
    assert (
        "student parameters" in console
        and "<assistant>" in console
        and not (tmp_path / "run").exists()
    )


# ---- Real data -----------------------------------------------------------------------------------


def test_two_steps_on_gsm8k_and_humaneval(byte_level, tmp_path):
    """The published files where they are at hand, rows of their form where not; domains mixed in
    every step.
    """
    shared = ROOT.parent / "shared" / "data"
    sources = {
        "gsm8k": shared / "gsm8k" / "train.jsonl",
        "humaneval": shared / "humaneval" / "HumanEval.jsonl",
    }
    own = {
        "gsm8k": {
            "question": "Ann has 2 pens and buys 3. How many?",
            "answer": "2+3=<<2+3=5>>5\n#### 5",
        },
        "humaneval": {
            "task_id": "HumanEval/0",
            "prompt": 'def one():\n    """Return 1."""\n',
            "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
        },
    }
    for name, source in sources.items():
        if not source.exists():
            source = tmp_path / f"{name}.jsonl"
            rows = [
                json.dumps(own[name]).replace("Ann", f"Ann {i}").replace("one", f"one_{i}")
                for i in range(64)
            ]
            source.write_text("\n".join(rows))
        succeed(
            [
                sys.executable,
                "scripts/prepare_data.py",
                name,
                "--source",
                str(source),
                "--output_dir",
                str(tmp_path / name),
            ]
        )
    files = [str(tmp_path / name / "train.jsonl") for name in sources]
    models = replace(byte_level, train=files)
    arguments = command(
        models, tmp_path / "run", "--max_prompt_tokens", "512", "--overlong_prompts", "truncate"
    )
    arguments += ["--domain_weights", "gsm8k=1", "humaneval=1", "--reward_weight", "0.1"]
    arguments += ["--reward_fn", "gsm8k=last_number", "exact_match"]
    succeed([*arguments, "--num_generations", "2"])
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["distill/k1/gsm8k"] != 0 and row["distill/k1/humaneval"] != 0 for row in rows)
    shutil.rmtree(tmp_path / "run")
