"""Two real ranks that share vLLM engines: the models' own numbers, whoever asks what, and no rank
that waits for a lost one.

L response length, H hidden size, V vocabulary.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from opd import processes
from tests.support.processes import ROOT, worker_environment
from tests.support.ranks import run_ranks
from tests.support.workers.tensor_parallel_worker import DEAL

WORKER = ROOT / "tests" / "support" / "workers" / "tensor_parallel_worker.py"
DEADLINE = 240  # seconds for one launch
TOLERANCE = 1e-4


def torchrun() -> list[str]:
    where = ["--master-addr", "127.0.0.1", "--master-port", str(processes.free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]


@pytest.fixture(scope="module")
def paths(tiny, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Model directories; `experts` is a mixture of experts."""
    experts = tmp_path_factory.mktemp("experts")
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        dtype="float32",
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(experts)
    tokenizer.save_pretrained(experts)
    return {
        "student": tiny.student,
        "addition": tiny.addition,
        "reversal": tiny.reversal,
        "experts": experts,
    }


@pytest.fixture(scope="module")
def reference(tiny, paths):
    """Hugging Face models by name; `reloaded` is the student with other weights."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for name, path in paths.items()
    }
    models["reloaded"] = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in models["reloaded"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return models


@pytest.fixture(scope="module")
def prompts(tiny, tokenizer) -> list[list[int]]:
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()][:6]
    return [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]


@pytest.fixture(scope="module")
def make_job(paths, reference, prompts, tmp_path_factory):
    def make() -> Path:
        out = tmp_path_factory.mktemp("job")
        save_file(
            {k: v.detach() for k, v in reference["reloaded"].named_parameters()},
            out / "weights.safetensors",
        )
        job = {
            "models": {name: str(path) for name, path in paths.items()},
            "prompts": prompts,
            "weights": str(out / "weights.safetensors"),
            "out": str(out),
        }
        (out / "job.json").write_text(json.dumps(job))
        return out / "job.json"

    return make


@pytest.fixture(scope="module")
def seen(make_job):
    """What both ranks report, and the tensors they got: lists by rank."""
    job = make_job()
    run_ranks(WORKER, "both_sizes", str(job), num_ranks=2, timeout_s=DEADLINE)
    reports = [json.loads((job.parent / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    return reports, [load_file(job.parent / f"rank_{rank}.safetensors") for rank in (0, 1)]


@torch.no_grad()
def states_of(model, ids: list[int]) -> torch.Tensor:
    return model.base_model(torch.tensor([ids])).last_hidden_state[0]


@torch.no_grad()
def logprobs_of(model, sample: dict) -> torch.Tensor:
    raw = torch.tensor([sample["prompt"] + sample["ids"]])
    logprobs_LV = model(raw).logits[0, len(sample["prompt"]) - 1 : -1].log_softmax(-1)
    return logprobs_LV.gather(-1, torch.tensor(sample["ids"])[:, None])[:, 0]


def gap(samples: list[dict], model) -> float:
    return max(
        float((torch.tensor(s["logprobs"]) - logprobs_of(model, s)).abs().max()) for s in samples
    )


def mine_of(seen, part: str, key: str) -> list[dict]:
    return [sample for report in seen[0] for sample in report[part][key]]


# ---- The engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unequal", "none_on_one", "none"])
def test_a_shared_generator_samples_what_the_model_says(seen, reference, prompts, part):
    """Each rank gets the responses to its own prompts, those of an engine that nobody shares."""
    samples = mine_of(seen, part, "shared")
    assert [s["prompt"] for s in samples] == prompts[: sum(DEAL[part])]
    assert [len(report[part]["shared"]) for report in seen[0]] == list(DEAL[part])
    if not samples:
        return
    assert gap(samples, reference["student"]) < TOLERANCE
    assert [s["ids"] for s in samples] == [s["ids"] for s in mine_of(seen, part, "own")]
    greedy = mine_of(seen, part, "shared_greedy")
    assert [s["ids"] for s in greedy] == [s["ids"] for s in mine_of(seen, part, "own_greedy")]
    assert [s["ids"] for s in greedy] != [s["ids"] for s in samples]


def test_a_shared_generator_takes_new_weights(seen, reference):
    samples = mine_of(seen, "reloaded", "shared")
    assert gap(samples, reference["reloaded"]) < TOLERANCE
    assert gap(samples, reference["student"]) > 100 * TOLERANCE
    assert [s["ids"] for s in samples] == [s["ids"] for s in mine_of(seen, "reloaded", "own")]


@pytest.mark.parametrize("teacher", ["addition", "reversal", "experts"])
@pytest.mark.parametrize("part", ["unequal", "none_on_one", "none"])
def test_hidden_states_of_shared_and_own_teachers(seen, reference, prompts, teacher, part):
    """addition has an engine on each rank; reversal, and experts after dense models, are shared."""
    start = 0
    for tensors, count in zip(seen[1], DEAL[part], strict=True):
        found = {
            key: state_LH
            for key, state_LH in tensors.items()
            if key.startswith(f"{part}/{teacher}/")
        }
        assert len(found) == count
        for i, ids in enumerate(prompts[start : start + count]):
            expected_LH = states_of(reference[teacher], ids)
            assert (found[f"{part}/{teacher}/{i}"] - expected_LH).abs().max() < TOLERANCE
        start += count


def test_ranks_with_different_work_for_a_pool_stay_in_step(seen):
    """Rank 1 has no prompt for the shared teacher, and without a cache every response is a call of
    its own.
    """
    whole, spilled = (
        [{k for k in t if k.startswith(f"{part}/")} for t in seen[1]]
        for part in ("whole", "spilled")
    )
    assert [sum("reversal" in key for key in keys) for keys in whole] == [2, 0]
    assert [sum("addition" in key for key in keys) for keys in whole] == [3, 1]
    assert all(key.startswith("whole/hidden/") for keys in whole for key in keys)
    assert all(key.startswith("spilled/sampled/") for keys in spilled for key in keys)
    assert [len(keys) for keys in whole] == [len(keys) for keys in spilled] == list(DEAL["unequal"])


# ---- Errors --------------------------------------------------------------------------------------


def test_nobody_waits_for_a_rank_that_failed_before_the_call(seen):
    for report in seen[0]:
        assert (
            report["failure"]["error"]
            == "RankError: the work failed on rank 1: RuntimeError: no prompts here"
        )
        assert report["failure"]["seconds"] < 30, "found by word, not by a timeout"


def test_ranks_that_come_for_different_work_are_told(seen):
    for report in seen[0]:
        error = report["different_work"]["error"]
        assert (
            "ranks [0, 1] of one group came for different work: ['teacher A', 'teacher B']" in error
        )


@pytest.mark.e2e
def test_a_rank_lost_inside_the_engine_ends_the_run(make_job):
    """The other rank waits in a reduction of vLLM's, where it cannot be asked."""
    job = make_job()
    result = subprocess.run(
        [*torchrun(), str(WORKER), "lost_inside", str(job)],
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode != 0
    assert "RuntimeError: out of memory in the second layer" in result.stderr
    assert time.time() - float((job.parent / "failed_at").read_text()) < 60
