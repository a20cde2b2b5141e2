"""Two real ranks that share vLLM engines: the models' own numbers, whoever asks what, and no rank that waits for a lost one.

L response length, H hidden size, V vocabulary.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import worker_environment
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from workers.tensor_parallel_worker import DEAL

from opd import distributed

WORKER = Path(__file__).parent / "workers" / "tensor_parallel_worker.py"
DEADLINE = 240  # seconds for one launch
TOLERANCE = 1e-4


def torchrun() -> list[str]:
    where = ["--master-addr", "127.0.0.1", "--master-port", str(distributed.free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]


@pytest.fixture(scope="module")
def reference(tiny):
    """Hugging Face models by name; `reloaded` is the student with other weights."""
    names = ("student", "addition", "reversal")
    models = {name: AutoModelForCausalLM.from_pretrained(getattr(tiny, name), dtype=torch.float32) for name in names}
    models["reloaded"] = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in models["reloaded"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return models


@pytest.fixture(scope="module")
def prompts(tiny, tokenizer) -> list[list[int]]:
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()][:6]
    return [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows]


@pytest.fixture(scope="module")
def make_job(tiny, reference, prompts, tmp_path_factory):
    def make() -> Path:
        out = tmp_path_factory.mktemp("job")
        save_file({k: v.detach() for k, v in reference["reloaded"].named_parameters()}, out / "weights.safetensors")
        job = {
            "models": {name: str(getattr(tiny, name)) for name in ("student", "addition", "reversal")},
            "prompts": prompts, "weights": str(out / "weights.safetensors"), "out": str(out),
        }  # fmt: skip
        (out / "job.json").write_text(json.dumps(job))
        return out / "job.json"

    return make


@pytest.fixture(scope="module")
def seen(make_job):
    """What both ranks report, and the tensors they got: lists by rank."""
    job = make_job()
    result = subprocess.run(
        [*torchrun(), str(WORKER), "both_sizes", str(job)], env=worker_environment(), capture_output=True, text=True,
        timeout=DEADLINE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
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
    return max(float((torch.tensor(s["logprobs"]) - logprobs_of(model, s)).abs().max()) for s in samples)


def test_it_runs(seen):
    print(json.dumps(seen[0][0]["failure"]), json.dumps(seen[0][1]["failure"]))
